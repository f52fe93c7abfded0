import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from dpt_t2i.scenes.shapes import fit_shape
from dpt_t2i.scenes.world import SHAPES, unit_outline

SIDE = 64


def mask(shape: str, extent: float, turn: float = 0.0) -> np.ndarray:
    """Coverage [64, 64] of a shape around (0.41, 0.57)."""
    fine = 8 * SIDE
    image = Image.new("L", (fine, fine))
    outline = (unit_outline(shape, turn) * extent + (0.41, 0.57)) * fine - 0.5
    ImageDraw.Draw(image).polygon([(x, y) for x, y in outline], fill=255)
    return np.asarray(image.reduce(8), dtype=np.float32) / 255


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extent", [0.24, 0.44])
@pytest.mark.parametrize("blur", [0, 1.2])
def test_shape_extent_and_box(shape, extent, blur):
    for turn in (-12, 0, 7):
        found = fit_shape(ndimage.gaussian_filter(mask(shape, extent, turn), blur), SIDE)
        assert found.shape == shape
        assert found.extent == pytest.approx(extent, rel=0.05)
        outline = (unit_outline(shape, turn) * extent + (0.41, 0.57)) * SIDE
        assert found.box == pytest.approx((*outline.min(axis=0), *outline.max(axis=0)), abs=0.8)


def test_a_small_cross_with_worn_arms_is_no_tiny_circle():
    """The same mask in a smaller image is a circle of a usual size; in this one it would be smaller than any drawn."""
    worn = np.clip((ndimage.gaussian_filter(mask("cross", 0.24, 6.0), 2.7) - 0.2) / 0.5, 0, 1)
    assert fit_shape(worn, SIDE).shape == "cross"
    assert fit_shape(worn, 50).shape == "circle"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_masks_without_a_shape_give_numbers(value):
    found = fit_shape(np.full((9, 5), value, dtype=np.float32), SIDE)
    assert found.shape is None
    assert np.isfinite([found.overlap, found.lead, found.extent, *found.box]).all()
