import colorsys
import math

import numpy as np
import pytest

from dpt_t2i.scenes.world import (
    COLORS,
    EXTENTS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    LARGE_FROM,
    OPPOSITE,
    SHAPES,
    Background,
    Scene,
    SceneObject,
    pair_held_out,
    relation_between,
    relation_held_out,
    scene_held_out,
    unit_outline,
)

GREY = Background("flat", (150, 150, 150), (150, 150, 150), 0.0, 0)


def thing(shape: str, color: str, cx: float, cy: float, extent: float = 0.25) -> SceneObject:
    return SceneObject(shape, color, "small", cx, cy, extent, 0.0, COLORS[color])


def box(cx: float, cy: float, width: float = 0.2, height: float = 0.2):
    return (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


@pytest.mark.parametrize(
    ("a", "b", "relation"),
    [
        (box(0.2, 0.5), box(0.8, 0.5), "left"),
        (box(0.8, 0.5), box(0.2, 0.5), "right"),
        (box(0.5, 0.2), box(0.5, 0.8), "above"),
        (box(0.5, 0.8), box(0.5, 0.2), "below"),
        # Both extents together are 0.4, so the centres must differ by more than 0.04.
        (box(0.50, 0.5), box(0.539, 0.5), None),
        (box(0.50, 0.5), box(0.541, 0.5), "left"),
        (box(0.50, 0.5), box(0.52, 0.539), None),
        (box(0.50, 0.5), box(0.52, 0.541), "above"),
        # The margin is of the sum of both: 0.2 + 0.6 asks for 0.08.
        (box(0.3, 0.5), box(0.379, 0.5, width=0.6), None),
        (box(0.3, 0.5), box(0.381, 0.5, width=0.6), "left"),
        # The longer way decides, even where it is the other one that is clear of its margin.
        (box(0.2, 0.2), box(0.6, 0.5), "left"),
        (box(0.2, 0.2), box(0.5, 0.6), "above"),
        (box(0.5, 0.5, width=0.6), box(0.57, 0.55, width=0.6), None),
        (box(0.25, 0.25), box(0.5, 0.5), None),  # exactly diagonal
        (box(0.5, 0.5), box(0.5, 0.5), None),
    ],
)
def test_relation_by_hand(a, b, relation):
    assert relation_between(a, b) == relation
    assert relation_between(b, a) == (OPPOSITE[relation] if relation else None)
    in_pixels = [tuple(64 * v for v in box) for box in (a, b)]
    assert relation_between(*in_pixels) == relation


@pytest.mark.parametrize(
    ("shape", "bounds"),
    [
        ("circle", (-0.5, -0.5, 0.5, 0.5)),
        ("square", (-0.45, -0.45, 0.45, 0.45)),
        ("triangle", (-0.52, -0.5, 0.52, 0.42)),
        ("cross", (-0.5, -0.5, 0.5, 0.5)),
    ],
)
def test_outline_and_box(shape, bounds):
    outline = unit_outline(shape)
    assert (*outline.min(axis=0), *outline.max(axis=0)) == pytest.approx(bounds)
    placed = thing(shape, "blue", 0.4, 0.6, extent=0.3).box
    assert placed == pytest.approx([c + 0.3 * b for c, b in zip((0.4, 0.6, 0.4, 0.6), bounds, strict=True)])


def test_outline_turns_clockwise():
    x, y = unit_outline("triangle", 90)[0]  # the apex points up, and a quarter later to the right
    assert (x, y) == pytest.approx((0.5, 0))


def test_turned_square_grows_its_box():
    turned = SceneObject("square", "blue", "small", 0.5, 0.5, 0.2, 45.0, COLORS["blue"])
    half = 0.2 * 0.45 * math.sqrt(2)
    assert turned.box == pytest.approx((0.5 - half, 0.5 - half, 0.5 + half, 0.5 + half))


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="hexagon"):
        unit_outline("hexagon")


def test_sizes_lie_apart():
    assert EXTENTS["small"][1] < LARGE_FROM < EXTENTS["large"][0]


def test_hues_lie_apart_and_black_and_white_outside_the_ground():
    hues = sorted(360 * colorsys.rgb_to_hsv(*COLORS[n])[0] for n in COLORS if n not in ("black", "white"))
    assert min(np.diff([*hues, hues[0] + 360])) >= 22.5
    assert max(COLORS["black"]) < 0.42 * 255 < 0.74 * 255 < min(COLORS["white"])


def test_held_out_pairs():
    assert len(HELD_OUT_PAIRS) == 6
    assert pair_held_out("green", "cross") and not pair_held_out("green", "circle")
    assert not pair_held_out(None, "cross")
    for color in COLORS:  # each colour and each shape is learned from others
        assert sum(not pair_held_out(color, shape) for shape in SHAPES) >= 3
    for shape in SHAPES:
        assert sum(not pair_held_out(color, shape) for color in COLORS) >= 6


def test_held_out_relations_read_from_both_ends():
    assert relation_held_out("triangle", "left", "square") and relation_held_out("square", "right", "triangle")
    assert relation_held_out("cross", "above", "circle") and relation_held_out("circle", "below", "cross")
    assert not relation_held_out("square", "left", "triangle") and not relation_held_out("triangle", "above", "square")
    assert {relation for _, relation, _ in HELD_OUT_RELATIONS} == {"left", "above"}


def test_a_scene_is_held_out_for_what_nobody_mentions():
    triangle, square = thing("triangle", "red", 0.2, 0.5), thing("square", "blue", 0.8, 0.5)
    far_circle = thing("circle", "green", 0.55, 0.85)
    assert scene_held_out(Scene((square, triangle), GREY))  # triangle left of square, in either order
    assert scene_held_out(Scene((far_circle, triangle, square), GREY))
    mirrored = [thing("triangle", "red", 0.8, 0.5), thing("square", "blue", 0.2, 0.5)]
    assert not scene_held_out(Scene(tuple(mirrored), GREY))
    assert scene_held_out(Scene((*mirrored, thing("cross", "green", 0.5, 0.9)), GREY))  # a green cross


@pytest.mark.parametrize("shape", SHAPES)
def test_a_box_is_the_bounds_of_the_outline_to_the_last_bit(shape: str) -> None:
    for rotation in (-11.3, 0.0, 7.9):
        drawn = SceneObject(shape, "red", "small", 0.31, 0.67, 0.213, rotation, COLORS["red"])
        assert drawn.box == (*drawn.outline.min(axis=0), *drawn.outline.max(axis=0))
