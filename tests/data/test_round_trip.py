"""Scenes -> a foreign format -> records: the same, as far as the format holds it."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dpt_t2i.config import DataConfig
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.data.sources import read_source
from tests.data import writers

COUNT = 6


@pytest.fixture(scope="module")
def drawn() -> Sequence[Record]:
    return writers.scenes(COUNT)


def read(folder: Path, form: str, **data: object) -> list[Record]:
    return list(read_source(DataConfig(dataset=str(folder), data_format=form, **data), "train", Faults()))


def same_pixels(found: Record, drawn: Record) -> bool:
    return found.load_image().tobytes() == drawn.load_image().tobytes()


def single(record: Record) -> tuple[Expression, ...]:
    return tuple(e for e in record.expressions if len(e.boxes) == 1)


def test_coco_gives_captions_and_a_name_for_what_is_there_once(drawn, tmp_path):
    records = read(writers.write_coco(drawn, tmp_path), "coco")
    assert [r.id for r in records] == [str(writers.FIRST_ID + i) for i in range(COUNT)]
    targets = 0
    for found, scene in zip(records, drawn, strict=True):
        assert found.captions == scene.captions and same_pixels(found, scene)
        things = writers.things_of(scene)
        counts = Counter(name for name, _ in things)
        wanted = {f"the {name}": box for name, box in things if counts[name] == 1}
        assert {e.text: e.boxes[0] for e in found.expressions} == wanted
        assert all(e.text[slice(*e.spans[0])] == e.text.removeprefix("the ") for e in found.expressions)
        targets += len(wanted)
    assert targets >= COUNT / 2, "the test sees targets"


def test_refcoco_gives_each_sentence_with_its_box(drawn, tmp_path):
    folder = writers.write_refcoco(drawn, tmp_path)
    names = ("refs(unc).p", "instances.json", "captions_train2014.json")
    files = tuple(folder / name for name in names)
    records = read(folder, "refcoco", annotations=files)
    wanted = [scene for scene in drawn if single(scene)]
    assert wanted and len(records) == len(wanted)
    for found, scene in zip(records, wanted, strict=True):
        assert found.captions == scene.captions and same_pixels(found, scene)
        assert found.expressions == tuple(Expression(e.text, ((0, len(e.text)),), e.boxes) for e in single(scene))


def test_refcoco_without_captions_takes_the_sentences(drawn, tmp_path):
    records = read(writers.write_refcoco(drawn, tmp_path), "refcoco")
    for record in records:
        assert record.captions == tuple(dict.fromkeys(e.text for e in record.expressions))


def test_mdetr_gives_expressions_spans_and_several_boxes(drawn, tmp_path):
    folder = writers.write_mdetr(drawn, tmp_path)
    files = (folder / "finetune_toy_train.json", folder / "captions_train.json")
    records = read(folder, "mdetr", annotations=files)
    wanted = [scene for scene in drawn if scene.expressions]
    assert len(records) == len(wanted)
    for found, scene in zip(records, wanted, strict=True):
        assert (found.captions, found.expressions) == (scene.captions, scene.expressions)
        assert found.source == "toy" and same_pixels(found, scene)


@pytest.mark.parametrize("write", [writers.write_release_tsv, writers.write_release_folder])
def test_the_release_gives_captions_and_both_kinds_of_negatives(
    drawn: Sequence[Record], tmp_path: Path, write: Callable[..., Path]
):
    records = read(write(drawn, tmp_path), "hard_negatives")
    assert len(records) == COUNT
    for index, (found, scene) in enumerate(zip(records, drawn, strict=True)):
        assert found.captions == scene.captions and same_pixels(found, scene)
        assert found.negatives == tuple(Negative(n.caption, "mined") for n in scene.negatives)
        assert found.load_negative_image().tobytes() == scene.load_negative_image().tobytes()
        assert found.coco_id == str(writers.FIRST_ID + index)
        assert scene.has_pair and not found.has_pair, "two lists, of which nobody says what belongs together"


def test_shards_give_everything(drawn, tmp_path):
    records = read(writers.write_shards(drawn, tmp_path), "webdataset")
    assert [r.id for r in records] == ["000000", "000002", "000004", "000001", "000003", "000005"]
    for found in records:
        scene = drawn[int(found.id)]
        assert (found.captions, found.expressions, found.negatives) == (
            scene.captions,
            scene.expressions,
            scene.negatives,
        )
        assert same_pixels(found, scene)
        assert found.load_negative_image().tobytes() == scene.load_negative_image().tobytes()
