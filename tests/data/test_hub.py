"""Hugging Face `datasets`: the native folder loads unchanged, as files, from disk and as a stream.

Without the extra `[data]` a small stand-in shows the one clear error; the rest is skipped.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from dpt_t2i.config import DataConfig
from dpt_t2i.data.hub import HubImage, _each, read_hub
from dpt_t2i.data.imagefolder import read_imagefolder
from dpt_t2i.data.sources import open_records
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.commands import export_scenes


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'huggingface needs `datasets`: pip install "dpt-t2i\[data\]"'):
        list(read_hub("x", "train"))
    with pytest.raises(InputError, match="pip install"):
        open_records(DataConfig(dataset="x", data_format="huggingface"), "train", 16)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (None, "must be an object, not null"),
        ({"bytes": None, "path": None}, "has neither bytes nor a path"),
        ({"bytes": None, "path": "gone.png"}, "cannot read image gone.png: No such file"),
        ({"bytes": b"x", "path": None}, "cannot read image row 0: cannot identify"),
    ],
)
def test_a_cell_without_a_picture_is_one_line(cell, says):
    with pytest.raises(InputError, match=says):
        HubImage([{"image": cell}], 0)()


def test_a_source_that_breaks_off_is_one_line():
    def rows():
        yield {"caption": "a"}
        raise ConnectionError("gone\naway")

    found = _each(rows(), "x")
    assert next(found) == {"caption": "a"}
    with pytest.raises(InputError, match="cannot load data set `x`: ConnectionError: gone away$"):
        next(found)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


def assert_same(found: list[Any], folder: Path) -> None:
    for there, here in zip(found, read_imagefolder(folder), strict=True):
        assert (there.captions, there.expressions, there.negatives) == (
            here.captions,
            here.expressions,
            here.negatives,
        )
        assert there.load_image().tobytes() == here.load_image().tobytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_the_native_folder_loads_unchanged(library, tmp_path, streaming):
    export_scenes(tmp_path, n=4, seed=5)
    assert_same(list(read_hub(str(tmp_path), "train", streaming=streaming, limit=4)), tmp_path)


def test_a_folder_of_save_to_disk(library, tmp_path):
    export_scenes(tmp_path / "a", n=5, seed=5)
    plain = library.load_dataset("imagefolder", data_dir=str(tmp_path / "a"))
    plain.save_to_disk(str(tmp_path / "b"))
    assert_same(list(read_hub(str(tmp_path / "b"), "train")), tmp_path / "a")
    config = DataConfig(dataset=str(tmp_path / "b"), data_format="huggingface", val_samples=2)
    train, val = (open_records(config, side, 64) for side in ("train", "val"))
    assert ([r.id for r in train], [r.id for r in val]) == (["0", "1", "2"], ["3", "4"])
    with pytest.raises(InputError, match="has no split `tset`; it has train"):
        list(read_hub(str(tmp_path / "b"), "tset"))


def test_what_cannot_be_had_is_one_line(library, tmp_path):
    with pytest.raises(InputError, match="cannot load data set"):
        list(read_hub(str(tmp_path / "gone"), "train"))
    with pytest.raises(InputError, match="give max_samples"):
        list(read_hub(str(tmp_path), "train", streaming=True))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="no column `image`, only text"):
        list(read_hub(str(tmp_path / "t"), "train"))
