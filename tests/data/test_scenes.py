"""Drawn examples as records: pixels of the boxes, what goes where, the same record wherever it is drawn."""

from typing import get_args

import numpy as np
import pytest

from dpt_t2i.config import DataConfig
from dpt_t2i.config.sections import SceneCategory
from dpt_t2i.data.scenes import SceneRecords, scene_record
from dpt_t2i.data.sources import open_records
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.example import Example, HardNegative, make_example
from dpt_t2i.scenes.language import Caption, Category
from dpt_t2i.scenes.referring import Referring
from dpt_t2i.scenes.world import Background, Scene, SceneObject

GREY, RED, BLUE = (128, 128, 128), (215, 40, 40), (40, 40, 215)
GROUND = Background("flat", GREY, GREY, 0.0, 0)


def square(cx: float, cy: float, color: str = "red", rgb: tuple[int, int, int] = RED) -> SceneObject:
    """Extent 0.4: the outline reaches 0.45 * 0.4 = 0.18 to every side of the centre."""
    return SceneObject("square", color, "large", cx, cy, 0.4, 0.0, rgb)


@pytest.fixture(scope="module")
def example() -> Example:
    left, right = square(0.2, 0.3), square(0.7, 0.6)
    return Example(
        scene=Scene((left, right), GROUND),
        caption=Caption("two red squares", (), "counting", ((0, 15),)),
        negative=HardNegative(
            Caption("one blue square", (), "single_object", ((0, 15),)),
            "replace_color",
            Scene((square(0.2, 0.3, "blue", BLUE),), GROUND),
        ),
        expressions=(
            Referring("the square on the left", (4, 10), (left.box,)),
            Referring("the two squares", (4, 15), (right.box, left.box)),
        ),
    )


def test_boxes_are_pixels_xywh_in_the_expressions_order(example):
    record = scene_record(example, "a", 50)
    one, both = record.expressions
    # xyxy (0.02, 0.12, 0.38, 0.48) and (0.52, 0.42, 0.88, 0.78) of 50 pixels
    assert one.boxes[0] == pytest.approx((1, 6, 18, 18))
    assert both.boxes[0] == pytest.approx((26, 21, 18, 18))
    assert both.boxes[1] == pytest.approx((1, 6, 18, 18))
    assert (one.text, one.spans) == ("the square on the left", ((4, 10),))
    assert (both.text, both.spans) == ("the two squares", ((4, 15), (4, 15))), "a span for each box"


def test_a_box_holds_its_thing_and_nothing_of_it_is_outside(example):
    record = scene_record(example, "a", 50)
    image = record.load_image()
    assert image.size == (50, 50)
    inside = np.zeros((50, 50), dtype=bool)
    for x, y, w, h in record.expressions[1].boxes:
        inside[round(y) : round(y + h), round(x) : round(x + w)] = True
    red = np.asarray(image)[..., 1] < 80
    assert red.sum() > 2 * 16 * 16 and not (red & ~inside).any()


def test_texts_and_the_negative_go_where_they_belong(example):
    record = scene_record(example, "a", 50)
    assert (record.id, record.source, record.captions) == ("a", "scenes", ("two red squares",))
    assert [(n.caption, n.rule) for n in record.negatives] == [("one blue square", "replace_color")]
    negative = record.load_negative_image()
    assert negative is not None and negative.size == (50, 50)
    red, blue = record.load_image().getpixel((10, 15)), negative.getpixel((10, 15))
    assert red[0] > 180 > 60 > red[2] and blue[2] > 180 > 60 > blue[0]
    assert negative.getpixel((35, 30)) == GREY, "the second square is only in the true picture"


def facts(record) -> tuple:
    return record.id, record.captions, record.expressions, record.negatives, record.load_image().tobytes()


def test_a_record_is_the_same_however_it_is_reached():
    records = SceneRecords("train", 6, 32, seed=2)
    want = facts(records[4])
    assert facts(SceneRecords("train", 1000, 32, seed=2)[4]) == want
    assert facts(list(records)[4]) == want
    assert [facts(record) for record in records[4:100]] == [want, facts(records[5])]
    assert want[0] == "train-2-000004"


def test_splits_seeds_and_rows_differ():
    scenes = [SceneRecords(split, 3, 32, seed)[row] for split in ("train", "val") for seed in (0, 1) for row in (0, 1)]
    assert len({record.load_image().tobytes() for record in scenes}) == 8
    assert len({record.id for record in scenes}) == 8


def test_size_changes_pixels_and_boxes_alone():
    small, large = SceneRecords("train", 2, 32)[1], SceneRecords("train", 2, 64)[1]
    assert small.captions == large.captions and large.load_image().size == (64, 64)
    for a, b in zip(small.expressions, large.expressions, strict=True):
        assert [2 * value for box in a.boxes for value in box] == pytest.approx(
            [value for box in b.boxes for value in box]
        )


def test_length_and_ends():
    records = SceneRecords("val", 3, 16)
    assert len(records) == 3 and len(list(records)) == 3
    for index in (3, -1):
        with pytest.raises(IndexError):
            records[index]
    assert records[3:] == []


def test_categories_come_in_turn_and_the_held_out_examples_stay_as_they_are():
    wanted = ("position", "counting", "position")
    drawn = SceneRecords("train", 12, 32, seed=2, categories=wanted)
    told = [make_example(i, seed=2, category=wanted[i % 3]).caption for i in range(12)]
    assert [record.captions[0] for record in drawn] == [caption.text for caption in told]
    assert [caption.category for caption in told] == [*wanted] * 4
    config = DataConfig(scene_categories=wanted, data_seed=2, val_samples=4)
    assert open_records(config, "train", 32)[4].captions == drawn[4].captions
    plain = open_records(DataConfig(data_seed=2, val_samples=4), "val", 32)
    assert [r.captions for r in open_records(config, "val", 32)] == [r.captions for r in plain]


def test_categories_of_another_data_set_are_one_line(tmp_path):
    with pytest.raises(InputError, match="scene_categories choose among scenes"):
        open_records(DataConfig(dataset=str(tmp_path), scene_categories=("position",)), "train", 32)


def test_the_config_knows_the_worlds_categories():
    assert get_args(SceneCategory) == get_args(Category)
