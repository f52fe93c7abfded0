import pytest
import torch
from PIL import Image

from dpt_t2i.data.transforms import fit_square, to_pixels


def painted(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    return image


def red_box(image: Image.Image) -> tuple[float, float, float, float]:
    """Tight xyxy of the red pixels, fractions of the side."""
    pixels = to_pixels(image)
    red = (pixels[0] > 0.5) & (pixels[1] < 0)
    ys, xs = red.nonzero(as_tuple=True)
    side = image.size[0]
    return tuple(float(v) / side for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((64, 64), (8, 8, 16, 16)),
        ((128, 64), (0, 16, 32, 32)),  # at the far left: the centre crop would cut it
        ((128, 64), (96, 16, 32, 32)),
        ((64, 128), (16, 96, 32, 32)),
        ((128, 64), (8, 16, 112, 32)),  # wider than any square crop: letterbox
    ],
)
def test_box_follows_its_pixels(size, box):
    square, boxes = fit_square(painted(*size, box), [box], 64)
    assert square.size == (64, 64)
    cx, cy, w, h = boxes[0].tolist()
    want = red_box(square)
    assert (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) == pytest.approx(want, abs=1.01 / 64)


def test_without_boxes_the_centre_is_cut():
    image = painted(128, 64, (32, 0, 64, 64))
    square, boxes = fit_square(image, [], 32)
    assert boxes.shape == (0, 4)
    assert to_pixels(square)[0].min() == 1.0  # all red, whose red channel is full
    assert to_pixels(square)[1].max() == -1.0


def test_never_squashed():
    square, boxes = fit_square(painted(128, 64, (40, 20, 24, 24)), [(40, 20, 24, 24)], 64)
    assert boxes[0, 2] == boxes[0, 3]


def test_pixel_range():
    pixels = to_pixels(Image.new("L", (2, 3), 255))
    assert pixels.shape == (3, 3, 2)
    assert torch.equal(pixels, torch.ones(3, 3, 2))
    assert to_pixels(Image.new("RGB", (1, 1))).max() == -1
