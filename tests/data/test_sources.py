"""Which records belong to which split of a data set."""

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dpt_t2i.config import DataConfig
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.data.sources import SCENES_TRAIN, open_records
from dpt_t2i.errors import InputError
from tests.data import writers


def imagefolder(folder: Path, names: str) -> Path:
    """One record a letter."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("L", (2, 2)).save(folder / f"{name}.png")
    lines = [json.dumps({"file_name": f"{name}.png", "captions": [name]}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_keys_that_restart_in_each_shard_are_other_pictures(tmp_path):
    """A shard's ids are its own: what is held out of one is not dropped from all."""
    for shard in range(3):
        with tarfile.open(tmp_path / f"train-{shard:03d}.tar", "w") as tar:
            for key in range(10):
                writers.add(tar, f"{key:04d}.png", writers.png(Image.new("L", (2, 2), 10 * shard + key)))
                writers.add(tar, f"{key:04d}.txt", f"{shard} {key}".encode())
    data = {"data_format": "webdataset", "val_samples": 4}
    held = {r.captions[0] for r in open_records(DataConfig(dataset=str(tmp_path), **data), "val", 16)}
    seen = {r.captions[0] for r in open_records(DataConfig(dataset=str(tmp_path), **data), "train", 16)}
    assert len(held) == 4 and len(seen) == 26 and not held & seen


def names(folder: Path, split, **data) -> str:
    records = open_records(DataConfig(dataset=str(folder), **data), split, 16)
    return "".join(record.captions[0] for record in records)


def test_scenes_are_drawn_at_the_asked_size_and_seed():
    config = DataConfig(val_samples=7, max_samples=50, data_seed=3)
    train, val = open_records(config, "train", 24), open_records(config, "val", 24)
    assert isinstance(train, SceneRecords) and isinstance(val, SceneRecords)
    assert (len(train), len(val)) == (50, 7)
    assert train[0].load_image().size == (24, 24)
    assert (train[0].id, val[6].id) == ("train-3-000000", "val-3-000006")
    assert len(open_records(DataConfig(), "train", 24)) == SCENES_TRAIN


def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    imagefolder(tmp_path / "train", "abcde")
    imagefolder(tmp_path / "val", "vwxyz")
    assert names(tmp_path, "train", val_samples=2) == "abcde", "nothing more is held out"
    assert names(tmp_path, "val", val_samples=2) == "vw"
    assert names(tmp_path, "val", val_samples=100) == "vwxyz"
    assert names(tmp_path, "train", max_samples=3) == "abc"


def test_the_tail_of_a_plain_folder_is_held_out(tmp_path):
    folder = imagefolder(tmp_path, "abcdef")
    assert (names(folder, "train", val_samples=2), names(folder, "val", val_samples=2)) == ("abcd", "ef")
    # The tail is the same whatever share of the rest is trained on.
    limited = {"val_samples": 2, "max_samples": 3}
    assert (names(folder, "train", **limited), names(folder, "val", **limited)) == ("abc", "ef")


def test_cocos_keypoints_are_no_instances_and_pictures_may_lie_in_images(tmp_path):
    writers.write_coco(writers.scenes(4), tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "train2017").rename(tmp_path / "images" / "train2017")
    for file in (tmp_path / "annotations").iterdir():
        file.rename(tmp_path / file.name)
    config = DataConfig(dataset=str(tmp_path), data_format="coco", val_samples=1)
    before = [record.expressions for record in open_records(config, "train", 64)]
    instances = tmp_path / "instances_train2017.json"
    (tmp_path / "person_keypoints_train2017.json").write_bytes(instances.read_bytes())
    assert [record.expressions for record in open_records(config, "train", 64)] == before and any(before)


def test_two_records_must_be_left_to_train_on(tmp_path):
    folder = imagefolder(tmp_path, "abcd")
    assert (names(folder, "train", val_samples=2), names(folder, "val", val_samples=2)) == ("ab", "cd")
    for split in ("train", "val"):
        with pytest.raises(InputError, match="has 4 records, too few to hold out val_samples=3"):
            names(folder, split, val_samples=3)


def test_an_unknown_name_is_no_data_set(tmp_path):
    with pytest.raises(InputError, match="`scnes` is neither `scenes` nor a folder"):
        open_records(DataConfig(dataset="scnes"), "train", 16)
    with pytest.raises(InputError, match=r"metadata\.jsonl does not exist"):
        names(tmp_path, "train")


@pytest.mark.parametrize(
    "form, name, value",
    [
        ("auto", "annotations", (Path("captions_train2017.json"),)),
        ("auto", "image_root", Path("images")),
        ("auto", "streaming", True),
        ("huggingface", "val_annotations", (Path("val.json"),)),
        ("webdataset", "image_root", Path("images")),
        ("coco", "streaming", True),
    ],
)
def test_a_setting_that_the_format_does_not_read_is_refused(tmp_path, form, name, value):
    folder = imagefolder(tmp_path, "abcdef")
    config = DataConfig(dataset=str(folder), data_format=form, val_samples=2, **{name: value})
    told = "imagefolder" if form == "auto" else form
    with pytest.raises(InputError, match=f"^{name} is not read from data of format {told}; leave it out, or say how"):
        open_records(config, "train", 16)


@pytest.mark.parametrize(
    "setting", [{"exclude_refs": (Path("refs(unc).p"),)}, {"train_split": "trian"}, {"val_split": "testA"}]
)
def test_scenes_refuse_what_they_do_not_read(setting):
    with pytest.raises(InputError, match=f"^{next(iter(setting))} is not read from data of format scenes"):
        open_records(DataConfig(**setting), "val", 16)


def test_drawn_scenes_are_said_to_be_what_is_trained_on(caplog):
    """Who forgets --dataset reads it before the hours, not after."""
    with caplog.at_level("INFO", "dpt_t2i"):
        open_records(DataConfig(max_samples=50), "train", 24)
    assert "train: 50 drawn scenes; --dataset names data of your own" in caplog.text
    with pytest.raises(InputError, match="streaming is not read from data of format scenes"):
        open_records(DataConfig(streaming=True), "train", 24)


@pytest.mark.parametrize(
    ("file", "form"),
    [
        ("annotations/captions_train2017.json", "coco"),
        ("refs(unc).p", "refcoco"),
        ("train_hard_neg.tsv", "hard_negatives"),
        ("train/000.tar", "webdataset"),
        ("finetune_refcoco_train.json", "mdetr"),
    ],
)
def test_a_folder_of_another_format_is_told_which(tmp_path, file, form):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("")
    with pytest.raises(InputError, match=f"and files as of format {form}; give --data_format {form}"):
        open_records(DataConfig(dataset=str(tmp_path)), "train", 16)


def test_a_folder_of_somebody_elses_files_is_told_nothing_of_a_format(tmp_path):
    (tmp_path / "dataset_infos.json").write_text("{}")
    with pytest.raises(InputError, match="metadata.jsonl does not exist; docs/data.md says how it is written"):
        open_records(DataConfig(dataset=str(tmp_path)), "train", 16)


def test_shards_by_a_pattern_need_streaming(tmp_path):
    pattern = str(tmp_path / "{000..127}.tar")
    with pytest.raises(InputError, match="does not exist; shards named one by one or by a pattern .* --streaming"):
        open_records(DataConfig(dataset=pattern, data_format="webdataset"), "train", 16)


def test_a_fault_is_told_once_though_both_parts_are_read_from_the_same_file(tmp_path, caplog):
    imagefolder(tmp_path, "abcdef")
    file = tmp_path / "metadata.jsonl"
    file.write_text(file.read_text() + "\n{}\n")
    config = DataConfig(dataset=str(tmp_path), on_bad="skip", val_samples=2)
    with caplog.at_level("INFO", "dpt_t2i"):
        assert [len(open_records(config, side, 16)) for side in ("train", "val")] == [4, 2]
    assert caplog.text.count("left out: ") == 1 and caplog.text.count("1 faults, left out") == 2
