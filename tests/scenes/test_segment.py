import colorsys

import numpy as np
import pytest

from dpt_t2i.scenes.render import render
from dpt_t2i.scenes.segment import HUED, classes_of, ground_of, hue_of, regions
from dpt_t2i.scenes.world import COLORS, Background, Scene, SceneObject

STRIPES = Background("stripes", (140, 143, 138), (152, 155, 150), 20.0, 5)


def drawn(*objects: SceneObject, ground: Background = STRIPES, size: int = 64) -> np.ndarray:
    return np.asarray(render(Scene(objects, ground), size), dtype=np.float32)


def square(color: str, cx: float, cy: float, extent: float = 0.3) -> SceneObject:
    return SceneObject("square", color, "large", cx, cy, extent, 0.0, COLORS[color])


def test_hues_by_hand():
    pure = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)], dtype=np.float32)
    assert hue_of(pure) == pytest.approx([0, 120, 240, 60], abs=1e-3)
    for name in HUED:
        exact = 360 * colorsys.rgb_to_hsv(*COLORS[name])[0]
        assert abs(hue_of(np.array(COLORS[name], dtype=np.float32)) - exact) < 1.5


def test_the_ground_goes_on_behind_things():
    bare, covered = drawn(), drawn(square("red", 0.3, 0.3), square("white", 0.7, 0.6))
    ground = ground_of(covered)
    assert ground is not None
    assert np.abs(ground - bare).max() < 12  # of 12 between the two shades, in waves
    assert np.abs(ground.mean(axis=(0, 1)) - bare.mean(axis=(0, 1))).max() < 1.5


def test_a_picture_without_a_ground():
    assert ground_of(np.full((64, 64, 3), (215, 40, 40), dtype=np.float32)) is None
    assert regions(np.full((64, 64, 3), 255, dtype=np.float32)) == []


@pytest.mark.parametrize("color", COLORS)
def test_classes_tell_things_from_the_ground(color):
    pixels = drawn(square(color, 0.5, 0.5, extent=0.4))
    classes = classes_of(pixels, ground_of(pixels))
    number = [*HUED, "black", "white"].index(color) + 1
    assert (classes[22:42, 22:42] == number).all()
    classes[20:44, 20:44] = 0
    assert not classes.any()


@pytest.mark.parametrize("size", [48, 64, 96])
def test_coverage_sums_to_the_area_and_stands_in_place(size):
    large, small = regions(drawn(square("blue", 0.7, 0.7, 0.4), square("white", 0.25, 0.3, 0.3), size=size))
    for region, (cx, cy), extent, color in ((large, (0.7, 0.7), 0.4, "blue"), (small, (0.25, 0.3), 0.3, "white")):
        area = float(region.coverage.sum())
        assert area == pytest.approx((0.9 * extent * size) ** 2, rel=0.06)
        x = (region.coverage.sum(axis=0) @ (np.arange(region.coverage.shape[1]) + 0.5)) / area + region.left
        y = (region.coverage.sum(axis=1) @ (np.arange(region.coverage.shape[0]) + 0.5)) / area + region.top
        assert (x / size, y / size) == pytest.approx((cx, cy), abs=0.004)
        assert region.shade == pytest.approx(0.975 * np.array(COLORS[color]), abs=4)
        assert np.abs(region.ground - np.array((146, 149, 144))).max() < 5


def test_neighbours_share_no_pixel():
    pixels = drawn(square("red", 0.3, 0.5), square("yellow", 0.58, 0.5))  # 0.01 apart
    total = np.zeros((64, 64))
    for region in regions(pixels):
        height, width = region.coverage.shape
        total[region.top : region.top + height, region.left : region.left + width] += region.coverage > 0
    assert total.max() == 1
