"""`dpt data inspect`: counts by hand, every kind of finding, and a sheet with the boxes where they belong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpt_t2i import cli
from dpt_t2i.config import InspectConfig
from dpt_t2i.data.inspection import look, run_inspect
from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.data.sheet import GAP, contact_sheet
from dpt_t2i.errors import InputError
from dpt_t2i.pictures import PALETTE


def flat(color: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (color, color, color))


def record(index: int, *captions: str, image=None, **fields) -> Record:
    image = image or (lambda: flat(index))
    return Record(str(index), "toy", image, captions or (f"caption {index}",), **fields)


def dot(text: str, *boxes: tuple[float, float, float, float]) -> Expression:
    return Expression(text, ((0, 3),) * len(boxes), boxes)


def test_two_records_of_one_picture_are_no_duplicates():
    twice = [replace(record(number, image=lambda: flat(0)), image_id="7") for number in (0, 1)]
    assert look(twice).suspicious == {}


def test_every_kind_of_finding_and_no_other(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    records = [
        record(0),
        record(1, image=lambda: flat(0)),  # the picture of 0
        record(2, "caption 0"),  # the caption of 0
        record(3, image=broken),
        record(4, expressions=(dot("dot", (0, 0, 4, 4)), dot("far", (6, 6, 4, 4)))),
        record(5, "x", "x"),
        record(6, negatives=(Negative("caption 6", "toy"),)),
        record(7, negative_image=broken),
        record(8, expressions=(dot("dot", (0, 0, 4, 4)), dot("dot", (1, 1, 4, 4)))),
        record(9, image=lambda: flat(9, (16, 8))),
    ]
    findings = look(records)
    assert findings.suspicious == {
        "duplicate picture": ["toy/0 = toy/1"],
        "duplicate caption": ["'caption 0' of 2 pictures"],
        "unreadable": [f"toy/3: cannot read image {broken}: cannot identify its format; "
                       "replace or remove the file"],
        "box outside": ["toy/4: box [6, 6, 4, 4] lies outside the image of 8 x 8 pixels (boxes are x, y, width, height "
                        "in pixels)"],
        "caption twice": ["toy/5"],
        "negative is a caption": ["toy/6: 'caption 6'"],
        "unreadable negative": [f"toy/7: cannot read image {broken}: cannot identify its format; "
                                "replace or remove the file"],
        "ambiguous expression": ["toy/8: 'dot' names 2 different things"],
    }  # fmt: skip
    assert findings.sizes == {(8, 8): 8, (16, 8): 1} and findings.unreadable == {3}


def native(folder: Path, count: int) -> Path:
    folder.mkdir()
    lines = []
    for index in range(count):
        flat(200 - index, (20 + index, 10)).save(folder / f"{index}.png")
        thing = {"text": "the dot", "spans": [[4, 7]], "boxes": [[2, 2, 4, 4]]}
        lines.append(
            {"file_name": f"{index}.png", "captions": [f"caption {index}"], "expressions": [thing][: index % 2]}
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    return folder


def test_the_command_writes_what_it_tells(tmp_path, capsys):
    folder = native(tmp_path / "data", 5)
    out = tmp_path / "out"
    code = cli.main(
        [
            "data",
            "inspect",
            "--data_format",
            "imagefolder",
            "--dataset",
            str(folder),
            "--output_dir",
            str(out),
            "--json",
        ]
    )
    assert code == 0
    told = json.loads(capsys.readouterr().out)
    written = json.loads((out / "inspection.json").read_text())
    assert {key: told[key] for key in written} == written
    assert written["counts"] == {
        "records": 5,
        "captions": 5,
        "expressions": 2,
        "boxes": 2,
        "without_expression": 3,
        "negatives": 0,
        "without_negative": 5,
        "negative_images": 0,
    }
    assert written["sizes"]["width"] == [20, 24] and written["sizes"]["height"] == [10, 10]
    assert list(written["suspicious"]) == ["broken"] and "line 6" in written["suspicious"]["broken"][0]
    assert Image.open(out / "contact_sheet.png").size[0] > 0


def test_the_sheet_leaves_out_what_cannot_be_opened(tmp_path):
    folder = native(tmp_path / "data", 3)
    (folder / "1.png").write_bytes(b"x")
    result = run_inspect(InspectConfig(dataset=str(folder), output_dir=tmp_path / "out", sheet_size=64))
    assert list(result["suspicious"]) == ["broken", "unreadable"]
    assert Image.open(result["contact_sheet"]).size[0] == 2 * (64 + GAP) + GAP


def test_nothing_whole_is_bad_input(tmp_path, capsys):
    folder = native(tmp_path / "data", 0)
    assert cli.main(["data", "inspect", "--dataset", str(folder), "--output_dir", str(tmp_path / "out")]) == 2
    assert "error:" in capsys.readouterr().err
    with pytest.raises(InputError, match="neither `scenes` nor a folder"):
        run_inspect(InspectConfig(dataset=str(tmp_path / "gone"), output_dir=tmp_path / "out"))


def test_a_box_is_drawn_where_its_thing_is() -> None:
    sheet = np.asarray(
        contact_sheet([record(0, image=lambda: flat(255, (50, 50)), expressions=(dot("dot", (10, 20, 20, 10)),))], 100)
    )
    blue = tuple(int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5))
    picture = sheet[GAP : GAP + 100, GAP : GAP + 100]
    ys, xs = np.nonzero((picture == blue).all(axis=-1))
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (20, 60, 40, 60)  # twice as large


def test_boxes_in_fractions_are_suspicious():
    inside = Record("1", "toy", lambda: flat(1, (8, 8)), ("a",), (dot("dot", (0.1, 0.2, 0.3, 1.0)),))
    fine = Record("2", "toy", lambda: flat(2, (8, 8)), ("b",), (dot("dot", (0, 0, 1, 2)),))
    said = "toy/1: [0.1, 0.2, 0.3, 1.0]; boxes are in pixels, are these fractions?"
    assert look([inside, fine]).suspicious == {"box of a pixel": [said]}


def test_a_misspelt_key_and_the_other_part_are_told(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        flat(3).save(tmp_path / part / "a.png")
        row = {"file_name": "a.png", "captions": ["a"], "expresions": [], "negative": [], "license": "mine"}
        (tmp_path / part / "metadata.jsonl").write_text(json.dumps(row))
    result = run_inspect(InspectConfig(dataset=str(tmp_path), output_dir=tmp_path / "out"))
    assert result["suspicious"] == {
        "unknown key": [
            f"{tmp_path / 'train/metadata.jsonl'}, line 1: `expresions` is not read; did you mean `expressions`?",
            f"{tmp_path / 'train/metadata.jsonl'}, line 1: `negative` is not read; did you mean `negatives`?",
        ]
    }
    assert result["summary"][-1] == f"of the part `train` alone; --split val looks at {tmp_path / 'val'}"


def test_a_flat_folder_asked_for_its_val_part_says_that_it_has_none(tmp_path):
    flat(3).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "captions": ["a"]}))
    for split, told in (("train", False), ("val", True)):
        result = run_inspect(InspectConfig(dataset=str(tmp_path), split=split, output_dir=tmp_path / "out"))
        assert any(f"{tmp_path} has no folder `val`" in line for line in result["summary"]) == told
