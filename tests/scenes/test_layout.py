import colorsys
from dataclasses import replace

import numpy as np
import pytest

from dpt_t2i.scenes.facts import Phrase
from dpt_t2i.scenes.layout import clearly, draw_background, draw_object, draw_scene, draw_shade, fits, random_phrase
from dpt_t2i.scenes.world import COLORS, EXTENTS, RELATIONS, SHAPES, SceneObject, pair_held_out


def hsv(rgb):
    return colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))


@pytest.mark.parametrize("color", COLORS)
def test_shades_stay_close_to_their_colour(color):
    rng = np.random.default_rng(0)
    hue, saturation, value = hsv(COLORS[color])
    for _ in range(200):
        h, s, v = hsv(draw_shade(color, rng))
        assert abs(v - value) <= 0.063
        if color not in ("black", "white"):
            assert abs((h - hue + 0.5) % 1 - 0.5) <= 5.6 / 360
            assert abs(s - saturation) <= 0.065


def test_grounds_are_calm_and_of_every_kind():
    rng = np.random.default_rng(0)
    grounds = [draw_background(rng) for _ in range(400)]
    assert {g.kind for g in grounds} == {"flat", "gradient", "clouds", "stripes"}
    for ground in grounds:
        for shade in (ground.first, ground.second):
            _, s, v = hsv(shade)
            assert s <= 0.11 and 0.415 <= v <= 0.745


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", EXTENTS)
def test_objects_are_as_told_and_inside_the_border(shape, size):
    rng = np.random.default_rng(0)
    low, high = EXTENTS[size]
    for _ in range(60):
        thing = draw_object(Phrase(shape, "blue", size), rng)
        assert (thing.shape, thing.color, thing.size) == (shape, "blue", size)
        assert low <= thing.extent <= high and abs(thing.rotation) <= 12
        assert min(thing.box) >= 0.03 - 1e-9 and max(thing.box) <= 0.97 + 1e-9


def test_open_attributes_are_drawn_but_never_held_out():
    rng = np.random.default_rng(0)
    things = [draw_object(Phrase("square"), rng) for _ in range(200)]
    assert {t.color for t in things} == set(COLORS) - {"orange", "purple"}  # such squares are held out
    assert {t.size for t in things} == {"small", "large"}


def test_things_stand_apart():
    rng = np.random.default_rng(0)
    drawn = 0
    for _ in range(60):
        scene = draw_scene([Phrase("circle"), Phrase("square"), Phrase("cross", size="small")], rng)
        if scene is None:
            continue
        drawn += 1
        assert fits(scene.objects)
        boxes = [o.box for o in scene.objects]
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                gap = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
                assert gap >= 0.045 - 1e-9
    assert drawn > 40


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_told_side_is_clear(relation):
    rng = np.random.default_rng(0)
    for _ in range(30):
        scene = draw_scene([Phrase("circle"), Phrase("square")], rng, relation)
        if scene is None:
            continue
        a, b = scene.objects
        dx = (a.box[0] + a.box[2] - b.box[0] - b.box[2]) / 2
        dy = (a.box[1] + a.box[3] - b.box[1] - b.box[3]) / 2
        along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
        assert abs(along) > 1.3 * abs(across)
        assert (along < 0) == (relation in ("left", "above"))


def test_no_room_gives_no_scene():
    crowd = [Phrase("circle", size="large")] * 9
    assert draw_scene(crowd, np.random.default_rng(0)) is None


def test_fits_and_clearly_by_hand():
    left = SceneObject("circle", "red", "small", 0.2, 0.5, 0.2, 0.0, COLORS["red"])
    assert fits([left, replace(left, cx=0.45)])  # boxes 0.05 apart
    assert not fits([left, replace(left, cx=0.44)])  # 0.04 apart
    assert not fits([replace(left, cx=0.12)])  # 0.02 from the border
    assert clearly("left", left, replace(left, cx=0.72, cy=0.89))  # 0.52 > 1.3 x 0.39
    assert not clearly("left", left, replace(left, cx=0.70, cy=0.89))  # 0.50 < 1.3 x 0.39
    assert not clearly("right", left, replace(left, cx=0.7))


def test_random_phrases_cover_their_split():
    rng = np.random.default_rng(0)
    for held_out, pairs in ((False, 26), (True, 6)):
        drawn = {random_phrase(rng, held_out=held_out) for _ in range(600)}
        assert len(drawn) == pairs
        assert all(pair_held_out(p.color, p.shape) == held_out for p in drawn)
