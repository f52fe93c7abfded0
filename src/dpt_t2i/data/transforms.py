"""Box-safe geometry: a picture becomes a square without being squashed, and no box is lost on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dpt_t2i.boxes import xyxy_to_cxcywh

Box = tuple[float, float, float, float]

# Words that a mirror makes untrue, RefCOCO's short forms among them. "right" in another sense costs a flip, no more.
# A letter before or after is another word ("bright", "upright", "leftover"), but a place may stand before ("topleft").
SIDES = re.compile(
    r"\b(?:(?:top|bottom|upper|lower|far|mid|middle|center|centre|front|back|rear|most)?"
    r"(?:left|right|lef|letf|rigth|rihgt)(?:(?:er)?most|hand(?:ed(?:ly|ness)?|er|ers)?|sides?|wards?|wardly|ie|ies|y|er|ers|est|s|ish|wise)?"
    r"|(?:up|down)left|lft|rt|rgt|l|r|[lr]hs|(?:north|south)?-?(?:east|west)(?:ern(?:most)?|erly|wards?)?|starboard|portside"
    r"|(?:anti|counter|contra)?-?clockwise|o['’]?\s?clock)\b",
    re.IGNORECASE,
)


def fit_square(
    image: Image.Image, boxes: Sequence[Box], size: int, at: tuple[float, float] | None = None
) -> tuple[Image.Image, Tensor]:
    """`fit` to a square of `size` pixels a side."""
    return fit(image, boxes, (size, size), at)


def fit(
    image: Image.Image, boxes: Sequence[Box], size: tuple[int, int], at: tuple[float, float] | None = None
) -> tuple[Image.Image, Tensor]:
    """Resize and crop to a size that keeps the boxes; letterbox where no crop of that shape can.

    Args:
        image: RGB, any size.
        boxes: n boxes xywh in pixels of `image`.
        size: width and height in pixels: a square, or the picture's bucket (`nearest_bucket`).
        at: where the crop lies among all that keep the boxes, each way in [0, 1]; None = the centre one, moved as
            little as the boxes ask for.

    Returns:
        The picture of that size, and the boxes `[n, 4]` cxcywh in [0, 1] of it.
    """
    boxes = [_within(box, image.size) for box in boxes]
    window = _window(image.size, size, min)
    lowest, highest = (0.0, 0.0), (float(image.width - window[0]), float(image.height - window[1]))
    left, top = highest[0] / 2, highest[1] / 2
    if boxes:
        x0, y0 = min(b[0] for b in boxes), min(b[1] for b in boxes)
        x1, y1 = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
        if x1 - x0 > window[0] or y1 - y0 > window[1]:  # no crop of this shape holds them all
            window = _window(image.size, size, max)
            left, top = (image.width - window[0]) / 2, (image.height - window[1]) / 2
            at = None
        else:
            left, top = min(max(left, x1 - window[0]), x0), min(max(top, y1 - window[1]), y0)
            left, top = min(max(left, 0), highest[0]), min(max(top, 0), highest[1])
            lowest = max(0.0, x1 - window[0]), max(0.0, y1 - window[1])
            highest = min(highest[0], x0), min(highest[1], y0)
    if at is not None:
        left, top = (low + share * (high - low) for low, share, high in zip(lowest, at, highest, strict=True))
    left, top = math.floor(left + 0.5), math.floor(top + 0.5)  # whole pixels, for the picture and the boxes alike
    edges = [(x - left, y - top, x + w - left, y + h - top) for x, y, w, h in boxes]
    sides = torch.tensor([*window, *window], dtype=torch.float32)
    inside = torch.tensor(edges, dtype=torch.float32).reshape(-1, 4).div(sides).clamp(0, 1)
    return _cut(image, left, top, window, size), xyxy_to_cxcywh(inside)


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of some sizes (width, height) the one whose aspect ratio is nearest to that of `size`, by the logarithm: a
    picture twice as wide and one twice as high are equally far from a square. The first of several."""
    wanted = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - wanted))


def mirror(square: Image.Image, boxes: Tensor) -> tuple[Image.Image, Tensor]:
    """Left becomes right: the picture and its boxes `[n, 4]` cxcywh in [0, 1]."""
    flipped = boxes.clone()
    flipped[:, 0] = 1.0 - boxes[:, 0]
    return ImageOps.mirror(square), flipped


def names_a_side(text: str) -> bool:
    """Whether a text would change its truth in a mirror; `bright` does not, `a cat left of a dog` does."""
    return SIDES.search(text) is not None


def to_pixels(image: Image.Image) -> Tensor:
    """RGB picture -> float32 `[3, H, W]` in [-1, 1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).div_(127.5).sub_(1.0).contiguous()


def _within(box: Box, size: tuple[int, int]) -> Box:
    """The part inside the image: annotators round, and a hair's breadth outside must not undo a crop."""
    x, y, w, h = box
    if x >= 0 and y >= 0 and x + w <= size[0] and y + h <= size[1]:
        return box
    left, top = min(max(x, 0.0), size[0]), min(max(y, 0.0), size[1])
    return left, top, min(x + w, size[0]) - left, min(y + h, size[1]) - top


def _window(image: tuple[int, int], size: tuple[int, int], choose: Callable[[float, float], float]) -> tuple[int, int]:
    """Width and height, in pixels of the image, of the largest crop of the shape of `size` (choose = min), or of the
    smallest frame of that shape around the whole image (max). Rounding changes the shape by half a pixel at most."""
    scale = choose(image[0] / size[0], image[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _cut(image: Image.Image, left: int, top: int, window: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    if image.size == size == window:
        return image
    cropped = image.crop((left, top, left + window[0], top + window[1]))  # beyond the border it is black: the letterbox
    return cropped.resize(size, Image.Resampling.LANCZOS)
