"""A file is whole or not there."""

import pytest

from dpt_t2i.files import file_hash, in_one_move, keep_copy, write_text


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with in_one_move(path) as unfinished:
        unfinished.write_text("new")
        assert not path.exists() and unfinished.parent == path.parent, "a rename within one disk"
    assert path.read_text() == "new" and [found.name for found in path.parent.iterdir()] == ["b.txt"]


def test_an_error_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a.txt", "ü")
    with pytest.raises(RuntimeError), in_one_move(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "ü"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_copies_are_kept_apart(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for text in ("one", "two", "three"):
        file.write_text(text)
        keep_copy(file)
    names = ["metrics.before-2.jsonl", "metrics.before-3.jsonl", "metrics.before.jsonl", "metrics.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [(tmp_path / name).read_text() for name in names] == ["two", "three", "one", "three"]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert file_hash(tmp_path / "empty") == "e3b0c44298fc1c14", "of SHA-256 of nothing"
