"""What stands on which side, read from captions, and the loss of naming it."""

import math

import numpy as np
import torch
from tools.bundled.slots import NAMES, NOTHING, naming, slots_of

from dpt_t2i.scenes.world import COLORS, RELATIONS, SHAPES

COLOR_NAMES = list(COLORS)


def test_a_caption_names_both_things_on_their_sides() -> None:
    slots = slots_of(np.array([["a red circle left of a cross", "two blue squares"]]))
    assert slots.shape == (1, 2, 4, 2)
    left, right, above, below = (RELATIONS.index(side) for side in ("left", "right", "above", "below"))
    assert slots[0, 0, left].tolist() == [SHAPES.index("circle"), COLOR_NAMES.index("red")]
    assert slots[0, 0, right].tolist() == [SHAPES.index("cross"), -1]  # no colour is named
    assert slots[0, 0, [above, below]].tolist() == [[NOTHING, -1]] * 2  # "above" would be another caption
    assert (slots[0, 1] == -1).all()  # no side is named


def test_the_flipped_caption_and_the_exchanged_one_say_the_same() -> None:
    slots = slots_of(np.array([["a red circle above a blue square", "a blue square below a red circle"]]))
    assert (slots[0, 0] == slots[0, 1]).all()
    flipped = slots_of(np.array([["a red circle below a blue square", "a blue square above a red circle"]]))
    assert (flipped[0, 0] == flipped[0, 1]).all()
    assert (flipped[0, 0] != slots[0, 0]).any()


def test_loss_of_knowing_nothing_and_of_knowing_all() -> None:
    slots = torch.from_numpy(slots_of(np.array([["a red circle left of a cross", "two blue squares"]])))[0]
    assert NAMES == 4 * (5 + 8)
    nothing = naming(torch.zeros(2, NAMES), slots)
    assert math.isclose(nothing.item(), math.log(5) + math.log(8), rel_tol=1e-6)  # uniform over shapes and over colours
    sure = torch.zeros(2, 4, 5 + 8)
    sure[0, RELATIONS.index("left"), SHAPES.index("circle")] = 50
    sure[0, RELATIONS.index("left"), 5 + COLOR_NAMES.index("red")] = 50
    sure[0, RELATIONS.index("right"), SHAPES.index("cross")] = 50
    sure[0, [RELATIONS.index("above"), RELATIONS.index("below")], NOTHING] = 50
    assert naming(sure.flatten(1), slots).item() < 1e-6
    assert naming(torch.ones(1, NAMES), slots[1:]).item() == 0  # a batch in which nothing is named
