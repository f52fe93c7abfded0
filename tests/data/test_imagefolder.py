import json

import pytest

from dpt_t2i.data.faults import Faults
from dpt_t2i.data.imagefolder import read_imagefolder, read_rows
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.commands import export_scenes


def test_round_trip_gives_the_same_records(tmp_path):
    export_scenes(tmp_path, n=4, seed=5)
    for read, drawn in zip(read_imagefolder(tmp_path), SceneRecords("train", 4, 64, seed=5), strict=True):
        assert read.captions == drawn.captions
        assert read.expressions == drawn.expressions
        assert read.negatives == drawn.negatives
        assert read.load_image().tobytes() == drawn.load_image().tobytes()
        assert read.load_negative_image().tobytes() == drawn.load_negative_image().tobytes()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: Expecting"),
        (json.dumps({"captions": ["x"]}), "file_name"),
        (json.dumps({"file_name": "gone.png", "captions": ["x"]}), "gone.png does not exist"),
        (json.dumps({"file_name": "000000.png", "captions": [" "]}), "an empty caption"),
        (
            json.dumps(
                {
                    "file_name": "000000.png",
                    "captions": ["x"],
                    "expressions": [{"text": "t", "spans": [], "boxes": [[0, 0, 1, 1]]}],
                }
            ),
            "1 boxes but 0 spans",
        ),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    export_scenes(tmp_path, n=1)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="line 2") as caught:
        read_imagefolder(tmp_path)
    assert says in str(caught.value)


def test_where_every_line_is_broken_the_first_reason_is_told(tmp_path):
    export_scenes(tmp_path, n=2, size=16)
    file = next(tmp_path.rglob("metadata.jsonl"))
    file.write_bytes(file.read_text().encode("utf-16"))
    with pytest.raises(InputError, match="holds no record: all lines were left out, the first because: .*utf-8"):
        read_imagefolder(file.parent, Faults("skip"))


def test_rows_that_are_written_again_must_be_whole(tmp_path):
    """`perturb` and `mine` have no on_bad to set, so their error does not name it."""
    export_scenes(tmp_path, n=2, size=16)
    file = next(tmp_path.rglob("metadata.jsonl"))
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(InputError, match="line 3: key 'file_name' is missing; mend the line, or take it out") as caught:
        read_rows(file.parent)
    assert "on_bad" not in str(caught.value)


def test_missing_metadata_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="metadata.jsonl does not exist"):
        read_imagefolder(tmp_path)


def test_a_broken_image_is_named_when_it_is_opened(tmp_path):
    export_scenes(tmp_path, n=1)
    (tmp_path / "000000.png").write_bytes(b"not a picture")
    record = read_imagefolder(tmp_path)[0]
    with pytest.raises(InputError, match=r"cannot read image .*000000\.png"):
        record.load_image()


def test_a_folder_of_parts_names_them(tmp_path):
    for part in ("val", "train"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=f"does not exist; give {tmp_path / 'train'} or {tmp_path / 'val'}$"):
        read_imagefolder(tmp_path)


def test_captions_written_in_another_way_are_told_how(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no caption")
    with pytest.raises(InputError, match="metadata.jsonl does not exist; docs/data.md says how"):
        read_imagefolder(tmp_path)
    (tmp_path / "1.txt").write_text("a star")
    with pytest.raises(InputError, match="of captions in a .txt file beside each picture make one line a picture;"):
        read_imagefolder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text")
    with pytest.raises(InputError, match="metadata.csv is not read: write its rows as JSON, one a line; docs"):
        read_imagefolder(tmp_path)
    with pytest.raises(InputError, match="does not exist; give a folder that is there"):
        read_imagefolder(tmp_path / "gone")
