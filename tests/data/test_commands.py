"""`dpt data perturb` on a small folder."""

import json

import pytest

from dpt_t2i.config import PerturbConfig
from dpt_t2i.data.commands import run_perturb
from dpt_t2i.data.imagefolder import read_imagefolder
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.commands import export_scenes


@pytest.fixture
def folder(tmp_path):
    export_scenes(tmp_path / "scenes", n=12, seed=2)
    return tmp_path / "scenes"


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_negatives_go_behind_those_that_are_there(folder):
    before = rows(folder)
    result = run_perturb(PerturbConfig(dataset=folder, per_caption=2))
    after = rows(folder)
    assert [{**row, "negatives": row["negatives"][:1]} for row in after] == before
    added = [len(row["negatives"]) - 1 for row in after]
    assert sum(added) == sum(result["added"].values()) and max(added) == 2
    assert [len(record.negatives) for record in read_imagefolder(folder)] == [len(r["negatives"]) for r in after]


def test_twice_adds_nothing(folder):
    run_perturb(PerturbConfig(dataset=folder))
    once = rows(folder)
    assert run_perturb(PerturbConfig(dataset=folder))["added"] == {}
    assert rows(folder) == once


def test_a_caption_under_another_name_and_lines_that_only_python_breaks(folder):
    entries = [{"file_name": rows(folder)[0]["file_name"], "text": "two dogs\u2028on a red sofa"}]
    (folder / "metadata.jsonl").write_text(json.dumps(entries[0], ensure_ascii=False), encoding="utf-8-sig")
    assert sum(run_perturb(PerturbConfig(dataset=folder))["added"].values()) == 1
    (record,) = read_imagefolder(folder)
    assert record.captions == ("two dogs\u2028on a red sofa",) and len(record.negatives) == 1


def test_no_negative_is_another_caption_of_the_record(folder):
    entries = rows(folder)
    entries[0]["captions"] = ["two dogs", "Three dogs", "a zebra"]
    (folder / "metadata.jsonl").write_text(json.dumps(entries[0]) + "\n")
    run_perturb(PerturbConfig(dataset=folder, rules=("change_count",)))
    made = [n["caption"] for n in rows(folder)[0]["negatives"][1:]]
    assert made in (["Four dogs"], [])  # of "Three dogs" two or four, of "two dogs" three


def test_a_copy_leaves_the_folder_alone(folder, tmp_path):
    before = (folder / "metadata.jsonl").read_bytes()
    run_perturb(PerturbConfig(dataset=folder, output_dir=tmp_path / "copy"))
    assert (folder / "metadata.jsonl").read_bytes() == before
    copied = read_imagefolder(tmp_path / "copy")
    assert copied[0].load_image().tobytes() == read_imagefolder(folder)[0].load_image().tobytes()
    assert max(len(record.negatives) for record in copied) == 2


def test_bad_input_is_one_line_and_changes_nothing(folder, tmp_path):
    before = (folder / "metadata.jsonl").read_bytes()
    for config, says in (
        (PerturbConfig(dataset=folder, rules=("negate",)), "rule `negate` is unknown"),
        (PerturbConfig(dataset=folder, output_dir=tmp_path), "exists"),
        (PerturbConfig(dataset=folder, output_dir=folder / "new"), "lies inside"),
        (PerturbConfig(dataset=tmp_path / "none"), "does not exist"),
    ):
        with pytest.raises(InputError, match=says):
            run_perturb(config)
    assert (folder / "metadata.jsonl").read_bytes() == before


def test_a_row_whose_negative_is_a_picture_alone_gets_no_caption(folder):
    entries = rows(folder)
    for entry in entries[:6]:
        del entry["negatives"]  # `negative_file` stays
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    run_perturb(PerturbConfig(dataset=folder, per_caption=9))
    after = rows(folder)
    assert not any(row.get("negatives") for row in after[:6]), "the first would be taken for true of that picture"
    assert sum(len(row["negatives"]) for row in after[6:]) > sum(len(row["negatives"]) for row in entries[6:])
