"""An earlier result of other settings stays, under a number of its own."""

import json
from pathlib import Path

import pytest

from dpt_t2i.evaluation.provenance import set_aside, write_json, write_rows


@pytest.fixture
def result(tmp_path: Path) -> tuple[Path, Path]:
    """A result with its rows."""
    files = tmp_path / "itm.json", tmp_path / "itm_scores.jsonl"
    write_json(files[0], {"text": 0.8, "settings": {"seed": 0, "output_dir": "here", "derived": 7}})
    write_rows(files[1], [{"score": 1}])
    return files


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_the_same_settings_replace(result: tuple[Path, Path], tmp_path: Path) -> None:
    before = names(tmp_path)
    set_aside({"seed": 0, "output_dir": "elsewhere"}, *result)
    assert names(tmp_path) == before


def test_other_settings_keep_both(result: tuple[Path, Path], tmp_path: Path) -> None:
    set_aside({"seed": 1, "output_dir": "here"}, *result)
    assert names(tmp_path) == {"itm.1.json", "itm_scores.1.jsonl"}
    assert json.loads((tmp_path / "itm.1.json").read_text())["text"] == 0.8
    write_json(result[0], {"text": 0.9, "settings": {"seed": 1}})
    set_aside({"seed": 2}, *result)
    assert names(tmp_path) == {"itm.1.json", "itm_scores.1.jsonl", "itm.2.json"}
    assert json.loads((tmp_path / "itm.1.json").read_text())["text"] == 0.8


@pytest.mark.parametrize("broken", ["", "[]", '{"settings": null}'])
def test_what_cannot_be_read_is_kept_too(result: tuple[Path, Path], tmp_path: Path, broken: str) -> None:
    result[0].write_text(broken)
    set_aside({"seed": 0}, *result)
    assert (tmp_path / "itm.1.json").read_text() == broken and not result[0].exists()


def test_nothing_there(tmp_path: Path) -> None:
    set_aside({"seed": 0}, tmp_path / "itm.json")
    assert names(tmp_path) == set()
