import numpy as np
import pytest

from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.render import render
from dpt_t2i.scenes.world import COLORS, SHAPES, Background, Scene, SceneObject

FLAT = Background("flat", (150, 152, 148), (150, 152, 148), 0.0, 0)


def thing(shape: str = "square", rotation: float = 0.0, extent: float = 0.4) -> SceneObject:
    return SceneObject(shape, "blue", "large", 0.5, 0.5, extent, rotation, COLORS["blue"])


def pixels(scene: Scene, size: int = 64) -> np.ndarray:
    return np.asarray(render(scene, size), dtype=np.float64)


def test_an_empty_flat_scene_is_its_ground():
    image = render(Scene((), FLAT), 48)
    assert image.mode == "RGB" and image.size == (48, 48)
    assert image.getcolors() == [(48 * 48, FLAT.first)]


@pytest.mark.parametrize("shape", SHAPES)
def test_ground_outside_and_shade_at_the_centre(shape):
    drawn = pixels(Scene((thing(shape, rotation=7),), FLAT))
    away = drawn.copy()
    away[14:50, 14:50] = FLAT.first  # the object's box and a little more
    assert (away == FLAT.first).all()
    # Brightness falls by 5 % across the thing, so by 2.5 % to its centre.
    assert drawn[31:33, 31:33].mean(axis=(0, 1)) == pytest.approx(0.975 * np.array(COLORS["blue"]), abs=1)


def test_the_lower_right_is_darker():
    drawn = pixels(Scene((thing(),), FLAT))
    assert drawn[22, 22, 2] > drawn[32, 32, 2] > drawn[41, 41, 2]


def test_an_edge_is_mixed_by_its_share():
    """A square of 0.4 x 0.9 = 0.36 of 64 px: 23.04 px, from 20.48 to 43.52; half of pixels 20 and 43 are covered."""
    row = pixels(Scene((thing(),), FLAT))[32, :, 0]
    assert row[19] == row[44] == 150
    for edge, inside in ((20, 21), (43, 42)):
        share = (150 - row[edge]) / (150 - row[inside])
        assert 0.45 < share < 0.8  # in four steps to a pixel, one of which the outline itself may add


@pytest.mark.parametrize("shape", SHAPES)
def test_the_covered_area_is_the_outline_s(shape):
    placed = thing(shape, rotation=5)
    image = pixels(Scene((placed,), FLAT), 128)[..., 0]
    dark = 0.975 * COLORS["blue"][0]
    covered = ((150 - image) / (150 - dark)).sum() / 128**2
    (x, y), (u, v) = placed.outline.T, np.roll(placed.outline, -1, axis=0).T
    area = abs((x * v - u * y).sum()) / 2  # the shoelace formula
    assert covered == pytest.approx(area, rel=0.04)


def test_all_sizes_show_the_same_picture():
    for index in range(12):
        scene = make_example(index).scene
        large, small = pixels(scene, 128), pixels(scene, 64)
        halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - small).mean() < 1.0
        assert np.abs(halved - small).max() < 60  # a share of a pixel at an edge


@pytest.mark.parametrize("kind", ["gradient", "stripes", "clouds"])
def test_grounds_stay_between_their_shades(kind):
    first, second = (130, 140, 135), (150, 162, 156)
    image = pixels(Scene((), Background(kind, first, second, 30.0, 12345)))
    assert (image >= np.array(first) - 1).all() and (image <= np.array(second) + 1).all()
    assert image[..., 0].std() > 3  # and are not flat
    again = pixels(Scene((), Background(kind, first, second, 30.0, 12345)))
    assert (image == again).all()


def test_a_later_object_covers_an_earlier_one():
    red = SceneObject("circle", "red", "large", 0.5, 0.5, 0.3, 0.0, COLORS["red"])
    center = pixels(Scene((thing(), red), FLAT))[32, 32]
    assert center[0] > center[2]
