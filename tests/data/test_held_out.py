"""What is kept from training: pictures that are held out, and those of RefCOCO's validation and test."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from dpt_t2i.config import DataConfig
from dpt_t2i.data.examples import Examples, View
from dpt_t2i.data.records import Negative, Record
from dpt_t2i.data.sources import count, open_records
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.commands import export_scenes
from tests.data import writers

SPLITS = ("train", "val", "train", "testA", "testB", "train")  # the last scene names nothing alone: no ref


def open_ids(folder: Path, form: str, split: Any, **data: Any) -> list[str]:
    config = DataConfig(dataset=str(folder), data_format=form, **data)
    return [record.coco_id for record in open_records(config, split, 64)]


def ids(*numbers: int) -> list[str]:
    return [str(writers.FIRST_ID + number) for number in numbers]


def test_refcoco_keeps_its_splits_apart(tmp_path):
    folder = writers.write_refcoco(writers.scenes(6), tmp_path, SPLITS)
    assert open_ids(folder, "refcoco", "train") == ids(0, 2)
    assert open_ids(folder, "refcoco", "val") == ids(1)
    assert open_ids(folder, "refcoco", "val", val_split="testB") == ids(4)
    with pytest.raises(InputError, match="no refs of split `tset`; it has: testA, testB, train, val"):
        open_ids(folder, "refcoco", "val", val_split="tset")


def test_a_picture_of_both_splits_is_kept_from_training(tmp_path, caplog):
    # RefCOCOg's google split parts objects, not pictures.
    folder = writers.write_refcoco(writers.scenes(6), tmp_path, SPLITS)
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    next(ref for ref in refs if str(ref["image_id"]) == ids(2)[0])["split"] = "val"
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    caplog.set_level(logging.INFO)
    assert open_ids(folder, "refcoco", "train") == ids(0)
    assert "1 of 2 records and 0 hard-negative images left out of training" in caplog.text


def test_training_on_coco_leaves_refcocos_pictures_out_and_says_how_many(tmp_path, caplog):
    scenes = writers.scenes(8)
    refs = writers.write_refcoco(scenes[:6], tmp_path / "ref", SPLITS) / "refs(unc).p"
    writers.write_coco(scenes, tmp_path / "coco")
    writers.write_coco(scenes[:2], tmp_path / "coco", "val")
    caplog.set_level(logging.INFO)
    found = open_ids(tmp_path / "coco", "coco", "train", exclude_refs=(refs,))
    assert found == ids(0, 2, 5, 6, 7)
    assert "3 of 8 records" in caplog.text and "nothing is left out" not in caplog.text
    open_ids(tmp_path / "coco", "coco", "train")
    assert caplog.text.count("before measuring on those give --exclude_refs") == 1
    assert open_ids(tmp_path / "coco", "coco", "val", exclude_refs=(refs,)) == ids(0, 1), "held-out data may show them"


def test_hard_negative_pictures_of_the_release_are_left_out_too(tmp_path):
    scenes = writers.scenes(6)
    folder = writers.write_release_tsv(scenes, tmp_path / "tsv")
    file = folder / "train_hard_neg.tsv"
    own, other = repr([writers.file_name(500)]), repr([writers.file_name(1), writers.file_name(500)])
    file.write_text(file.read_text().replace(own, other, 1))  # row 0: mined is picture 1, which RefCOCO validates on
    refs = writers.write_refcoco(scenes, tmp_path / "ref", SPLITS) / "refs(unc).p"
    plain = DataConfig(dataset=str(folder), data_format="hard_negatives", val_samples=1)
    assert len(open_records(plain, "train", 64)[0].more_negative_images) == 1
    first = open_records(plain.model_copy(update={"exclude_refs": (refs,)}), "train", 64)[0]
    assert first.coco_id == ids(0)[0] and first.more_negative_images == ()
    assert first.load_negative_image().tobytes() == scenes[0].load_negative_image().tobytes()


def test_mdetr_files_exclude_all_their_pictures(tmp_path):
    scenes = writers.scenes(6)
    held = writers.write_mdetr(scenes[:2], tmp_path / "mdetr", "val") / "finetune_toy_val.json"
    writers.write_coco(scenes, tmp_path / "coco")
    found = open_ids(tmp_path / "coco", "coco", "train", exclude_refs=(held,), val_samples=1)
    assert found == ids(2, 3, 4)


def test_excluding_from_data_without_ids_is_refused(tmp_path):
    scenes = writers.scenes(6)
    refs = writers.write_refcoco(scenes, tmp_path / "ref", SPLITS) / "refs(unc).p"
    shards = writers.write_shards(scenes, tmp_path / "wds")
    with pytest.raises(InputError, match="no record of the data set tells its COCO image id"):
        open_ids(shards, "webdataset", "train", exclude_refs=(refs,), val_samples=1)


def test_no_picture_is_both_held_out_and_trained_on(tmp_path):
    folder = writers.write_release_tsv(writers.scenes(5), tmp_path)
    file = folder / "train_hard_neg.tsv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[2], lines[1]]) + "\n")  # pictures 1 and 0 again, as rows 5 and 6
    assert open_ids(folder, "hard_negatives", "val", val_samples=2) == ids(1, 0)
    assert open_ids(folder, "hard_negatives", "train", val_samples=2) == ids(2, 3, 4)


def test_a_random_negative_is_never_another_record_of_the_same_picture():
    image = writers.scenes(1)[0].image
    same = [Record(str(i), "toy", image, (f"same {i}",), image_id="1") for i in range(30)]
    examples = Examples([*same, Record("x", "toy", image, ("other",), image_id="2")], 64)
    assert {examples.item(epoch, row).random_caption for epoch in range(4) for row in range(5)} == {"other"}
    with pytest.raises(InputError, match="all 30 records show the picture `1`"):
        Examples(same, 64).item(0, 0)


def test_hard_captions_by_rule_fill_in_only_where_the_source_has_none():
    image = writers.scenes(1)[0].image
    own = Record("0", "toy", image, ("a",), negatives=(Negative("b", "mined"),))
    bare = Record("1", "toy", image, ("c",))
    none = Record("2", "toy", image, ("unknown",))

    def rules(caption: str) -> list[Negative]:
        return [Negative(f"not {caption}", "toy")] if caption != "unknown" else []

    filled = Examples([own, bare, none], 64, view=View(make_negatives=rules))
    assert [filled.item(0, row).hard_caption for row in range(3)] == ["b", "not c", None]
    assert [Examples([own, bare, none], 64).item(0, row).hard_caption for row in range(3)] == ["b", None, None]
    shown = Record("3", "toy", image, ("d",), negative_image=image)
    item = Examples([own, shown], 64, view=View(make_negatives=rules)).item(0, 1)
    assert item.hard_caption is None and item.hard_pixels is not None, "nothing says that `not d` is true of it"
    found = count([own, bare, none])
    assert (found.records, found.negatives, found.without_negative, found.without_expression) == (3, 1, 2, 3)


def test_mined_pictures_take_turns_and_repeat():
    images = [scene.image for scene in writers.scenes(4)]
    record = Record("0", "toy", images[0], ("a",), (), (), images[1], "", (images[2], images[3]))
    examples = Examples([record, Record("1", "toy", images[0], ("b",))], 64)
    shown = [examples.item(epoch, 0).hard_pixels for epoch in range(30)]
    assert len({float(pixels.sum()) for pixels in shown}) == 3
    assert all(bool((examples.item(e, 0).hard_pixels == shown[e]).all()) for e in range(30))


def test_a_broken_picture_among_the_held_out_is_left_out(tmp_path):
    folder = writers.write_release_tsv(writers.scenes(6), tmp_path)
    (folder / "images" / writers.file_name(4)).write_bytes(b"broken")
    assert open_ids(folder, "hard_negatives", "val", val_samples=3, on_bad="skip") == ids(3, 5)
    assert open_ids(folder, "hard_negatives", "val", val_samples=3) == ids(3, 4, 5), "an error when it is opened"


@pytest.mark.parametrize("form", ["coco", "mdetr", "hard_negatives", "webdataset"])
def test_an_empty_folder_is_one_clear_line(tmp_path, form):
    with pytest.raises(InputError, match=f"data_format {form}: none of .*; name the files with annotations"):
        open_ids(tmp_path, form, "train")
    with pytest.raises(InputError, match="data set folder .*gone does not exist"):
        open_ids(tmp_path / "gone", form, "train")


def test_mdetr_is_told_too_that_nothing_is_left_out(tmp_path, caplog):
    folder = writers.write_mdetr(writers.scenes(6), tmp_path)
    open_ids(folder, "mdetr", "train", val_samples=1)
    assert "nothing is left out of training" in caplog.text


def test_a_part_that_is_named_and_not_there_is_one_line(tmp_path, caplog):
    """Else the tail of what was trained on is taken for it."""
    export_scenes(tmp_path / "mine" / "train", n=6)
    caplog.set_level(logging.INFO)
    assert len(open_records(DataConfig(dataset=str(tmp_path / "mine"), val_samples=2), "val", 64)) == 2
    assert "held out: the last 2 of 6 records; there is no part `val`" in caplog.text
    with pytest.raises(InputError, match="mine has no part `tset`; give another --val_split"):
        open_records(DataConfig(dataset=str(tmp_path / "mine"), val_samples=2, val_split="tset"), "val", 64)


def test_mined_negatives_show_nothing_that_is_held_out(tmp_path):
    folder = tmp_path / "mine"
    export_scenes(folder, n=6)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[0]["negative_file"] = rows[5]["file_name"]  # which is held out
    rows[1]["negatives"] = [{"caption": rows[5]["captions"][0], "rule": "mined"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = open_records(DataConfig(dataset=str(folder), val_samples=1), "train", 64)
    assert [record.negative_image is None for record in train] == [True, False, False, False, False]
    assert (len(train[0].negatives), train[0].has_pair) == (1, False)
    assert train[1].negatives == () and not train[1].has_pair and train[2].has_pair


def test_ids_with_zeros_in_front_are_excluded_too(tmp_path):
    scenes = writers.scenes(6)
    refs = writers.write_refcoco(scenes, tmp_path / "ref", SPLITS) / "refs(unc).p"
    export_scenes(tmp_path / "mine", n=6)
    file = tmp_path / "mine" / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    told = [row | {"image_id": f"{int(ids(number)[0]):012d}"} for number, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in told))
    config = DataConfig(dataset=str(tmp_path / "mine"), val_samples=1, exclude_refs=(refs,))
    plain = {record.coco_id for record in open_records(config.model_copy(update={"exclude_refs": ()}), "train", 64)}
    kept = {record.coco_id for record in open_records(config, "train", 64)}
    assert (
        plain - kept
        == {identity for identity, split in zip(ids(*range(6)), SPLITS, strict=True) if split != "train"} & plain
    )
    assert plain - kept


@pytest.mark.parametrize("form", ["coco", "mdetr", "hard_negatives", "webdataset"])
def test_a_part_that_is_named_is_not_replaced_by_the_tail(tmp_path, form):
    write = {"coco": writers.write_coco, "mdetr": writers.write_mdetr, "hard_negatives": writers.write_release_tsv}
    folder = write.get(form, writers.write_shards)(writers.scenes(6), tmp_path)
    assert open_ids(folder, form, "val", val_samples=2)
    with pytest.raises(InputError, match="has no part `testA`; give another --val_split"):
        open_ids(folder, form, "val", val_samples=2, val_split="testA")


def test_a_folder_to_train_on_that_is_not_there_is_one_line(tmp_path):
    export_scenes(tmp_path / "mine", n=6)
    with pytest.raises(InputError, match="mine has no folder `trian`"):
        open_records(DataConfig(dataset=str(tmp_path / "mine"), train_split="trian"), "train", 64)
