import pytest
import torch
from PIL import Image

from dpt_t2i.data.transforms import fit, fit_square, names_a_side, nearest_bucket, to_pixels


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


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((640, 480), (80, 64)), ((480, 640), (64, 80)), ((500, 510), (64, 64)), ((4000, 100), (96, 48))],
)
def test_a_picture_goes_to_the_bucket_of_its_shape(size, bucket):
    # 4:3 = 1.33 lies between 5:4 = 1.25 (ratio 1.07) and 2:1 (ratio 1.5)
    assert nearest_bucket(size, [(64, 64), (80, 64), (64, 80), (96, 48), (48, 96)]) == bucket


@pytest.mark.parametrize("bucket", [(96, 48), (48, 96), (80, 64)])
@pytest.mark.parametrize("box", [(0, 16, 32, 32), (96, 16, 32, 32), (8, 4, 112, 56)])
def test_a_box_follows_its_pixels_into_a_bucket(bucket, box):
    picture, boxes = fit(painted(128, 64, box), [box], bucket)
    assert picture.size == bucket
    pixels = to_pixels(picture)
    ys, xs = ((pixels[0] > 0.5) & (pixels[1] < 0)).nonzero(as_tuple=True)
    want = [
        float(value) / side
        for value, side in (
            (xs.min(), bucket[0]),
            (ys.min(), bucket[1]),
            (xs.max() + 1, bucket[0]),
            (ys.max() + 1, bucket[1]),
        )
    ]
    cx, cy, w, h = boxes[0].tolist()
    assert (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) == pytest.approx(want, abs=1.5 / 48)
    assert w * bucket[0] / (h * bucket[1]) == pytest.approx(box[2] / box[3], rel=0.03), "not squashed"


def test_a_hairs_breadth_outside_changes_no_crop():
    picture = painted(640, 480, (10, 0, 50, 480))
    told, inside = (fit_square(picture, [(10.0, 0.0, 50.0, height)], 64) for height in (480.5, 480.0))
    assert torch.equal(told[1], inside[1]) and told[0].tobytes() == inside[0].tobytes()


@pytest.mark.parametrize("text", ["rigth man", "the lef one", "man on rhs", "letf side"])
def test_a_side_that_is_mistyped_is_one(text):
    assert names_a_side(text)
