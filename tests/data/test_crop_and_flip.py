"""`--center_crop`, `--random_flip`: boxes follow their pixels, and no text becomes untrue."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpt_t2i.data.examples import Examples, View
from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.data.transforms import fit_square, mirror, names_a_side


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right by one a pixel, so a pixel tells where it came from."""
    red = np.tile(np.arange(width, dtype=np.uint8), (height, 1))
    return Image.fromarray(np.stack([red, 0 * red, 0 * red], axis=-1))


def leftmost(square: Image.Image) -> int:
    return int(np.asarray(square)[0, 0, 0])


@pytest.mark.parametrize("share, left", [(0.0, 0), (0.25, 16), (1.0, 64)])
def test_a_crop_lies_anywhere(share: float, left: int) -> None:
    square, _ = fit_square(ramp(128, 64), (), 64, at=(share, 0.5))
    assert leftmost(square) == left


@pytest.mark.parametrize("share, left", [(0.0, 16), (0.5, 28), (1.0, 40)])
def test_a_crop_anywhere_keeps_the_box(share: float, left: int) -> None:
    # A box from 40 to 80 fits a window of 64 that begins between 80 - 64 = 16 and 40.
    square, boxes = fit_square(ramp(128, 64), [(40, 0, 40, 64)], 64, at=(share, 0.0))
    assert leftmost(square) == left
    assert boxes[0].tolist() == pytest.approx([(60 - left) / 64, 0.5, 40 / 64, 1.0])


def test_a_letterbox_has_no_choice() -> None:
    wide = [(2.0, 0.0, 120.0, 32.0)]
    whole = fit_square(ramp(128, 64), wide, 64)
    moved = fit_square(ramp(128, 64), wide, 64, at=(0.0, 1.0))
    assert torch.equal(whole[1], moved[1]) and whole[0].tobytes() == moved[0].tobytes()


def test_a_mirror_turns_picture_and_boxes() -> None:
    square, boxes = mirror(ramp(64, 64), torch.tensor([[0.25, 0.5, 0.125, 0.5]]))
    assert leftmost(square) == 63
    assert boxes.tolist() == [[0.75, 0.5, 0.125, 0.5]]


@pytest.mark.parametrize(
    "text",
    ["a cat left of a dog", "the RIGHT one", "leftmost man", "left-hand side", "guy on rt", "lft lady", "man on the l",
     "at 3 o'clock", "on the east", "turning clockwise", "left-handed man", "the lefthand cup", "topleft corner",
     "bottom-right", "farright guy", "2nd from the right's end", "leftmost", "rightermost", "going leftwards",
     "the rightest", "lefty", "northeast of it", "counter-clockwise", "upperleft"],
)  # fmt: skip
def test_a_text_with_a_side(text: str) -> None:
    assert names_a_side(text)


@pytest.mark.parametrize(
    "text",
    ["a bright star", "the copyright", "an upright bottle", "two cats above a dog", "", "brightest light",
     "leftover rice", "a downright mess", "a playwright", "birthright", "a cleft chin", "a deft lift", "righteous",
     "an eastertide egg", "the least", "a westie"],
)  # fmt: skip
def test_a_text_without_a_side(text: str) -> None:
    assert not names_a_side(text)


def record(number: int, caption: str, negative: str = "no dot", expression: str = "dot") -> Record:
    picture = ramp(64, 64)
    box = Expression(expression, ((0, 3),), ((0.0, 0.0, 16.0, 64.0),))
    negatives = (Negative(negative, "toy"),)
    return Record(str(number), "toy", lambda: picture, (caption,), (box,), negatives, lambda: picture)


def flips(*texts: str, random_flip: bool = True) -> list[bool]:
    """Whether the first record is mirrored, in each of 40 epochs."""
    examples = Examples([record(0, *texts), record(1, "other")], 64, view=View(random_flip=random_flip))
    items = [examples.item(epoch, 0) for epoch in range(40)]
    flipped = [bool(item.pixels[0, 0, 0] > -0.9) for item in items]
    for item, flip in zip(items, flipped, strict=True):
        assert item.hard_pixels is not None
        assert bool(item.hard_pixels[0, 0, 0] > -0.9) == bool(item.random_pixels[0, 0, 0] > -0.9) == flip, (
            "all together"
        )
        assert item.boxes[0, 0].item() == (0.875 if flip else 0.125)
    return flipped


def test_half_of_the_examples_are_mirrored() -> None:
    assert 10 <= sum(flips("a dot")) <= 30  # 40 coins: beyond these with a chance of 1 in 500
    assert flips("a dot") == flips("a dot"), "the same every time"
    assert not any(flips("a dot", random_flip=False))


@pytest.mark.parametrize("texts", [("left dot",), ("a dot", "a dot right of it"), ("a dot", "no dot", "dot at left")])
def test_an_example_whose_texts_name_a_side_is_never_mirrored(texts: tuple[str, ...]) -> None:
    assert not any(flips(*texts))


def test_crops_differ_by_epoch_and_repeat() -> None:
    wide = Record("0", "toy", lambda: ramp(128, 64), ("a dot",))
    examples = Examples([wide, record(1, "other")], 64, view=View(center_crop=False))
    lefts = [float(examples.item(epoch, 0).pixels[0, 0, 0]) for epoch in range(6)]
    assert len(set(lefts)) > 3 and lefts[0] == float(examples.item(0, 0).pixels[0, 0, 0])
