"""The pickles of RefCOCO and RefCOCO+ (unc) and of RefCOCOg (umd, google), each with the splits that it has."""

import pytest

from dpt_t2i.config import DataConfig
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.refcoco import held_out_images
from dpt_t2i.data.sources import open_records, read_source
from dpt_t2i.errors import InputError
from tests.data import writers

SPLITS = {"unc": ("train", "val", "testA", "testB"), "umd": ("train", "val", "test"), "google": ("train", "val")}


def ids(numbers):
    return [str(writers.FIRST_ID + number) for number in numbers]


@pytest.mark.parametrize("by", SPLITS)
def test_each_pickle_is_found_and_keeps_its_splits_apart(tmp_path, by):
    splits, scenes = SPLITS[by], [scene for scene in writers.scenes(12) if writers.things_of(scene)][:8]
    folder = writers.write_refcoco(scenes, tmp_path, splits, by)
    config = DataConfig(dataset=str(folder), data_format="refcoco")
    rows = {split: [i for i in range(8) if splits[i % len(splits)] == split] for split in splits}
    for split in splits[1:]:
        of_split = open_records(config.model_copy(update={"val_split": split}), "val", 64)
        assert [record.image_id for record in of_split] == ids(rows[split])
    assert [record.image_id for record in open_records(config, "train", 64)] == ids(rows["train"])
    assert held_out_images(folder / f"refs({by}).p") == set(ids(range(8))) - set(ids(rows["train"]))


def test_of_refcocog_with_both_pickles_one_is_named(tmp_path):
    scenes = writers.scenes(4)
    for by in ("umd", "google"):
        writers.write_refcoco(scenes, tmp_path, by=by)
    config = DataConfig(dataset=str(tmp_path), data_format="refcoco")
    with pytest.raises(InputError, match=r"takes one refs\(\*\).p and one instances.json, got .*google.*umd"):
        list(read_source(config, "train", Faults()))
    named = config.model_copy(update={"annotations": (tmp_path / "refs(google).p", tmp_path / "instances.json")})
    assert list(read_source(named, "train", Faults()))
