"""Box-safe geometry: a picture becomes a square without being squashed, and no box is lost on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dpt_t2i.boxes import xyxy_to_cxcywh

Box = tuple[float, float, float, float]

# Words that a mirror makes untrue, RefCOCO's short forms among them. "right" in another sense costs a flip, no more.
SIDES = re.compile(
    r"\b(?:left|right|(?:left|right)[-\s]?(?:most|hand|side|ward|wards|er)|lefts|rights|lft|rt|l|r|east|west"
    r"|eastern|western|(?:anti|counter)?-?clockwise|o['’]?clock)\b",
    re.IGNORECASE,
)


def fit_square(
    image: Image.Image, boxes: Sequence[Box], size: int, at: tuple[float, float] | None = None
) -> tuple[Image.Image, Tensor]:
    """Resize and crop to a square that keeps the boxes; letterbox where no square crop can.

    Args:
        image: RGB, any size.
        boxes: n boxes xywh in pixels of `image`.
        size: side of the square in pixels.
        at: where the crop lies among all that keep the boxes, each way in [0, 1]; None = the centre one, moved as
            little as the boxes ask for.

    Returns:
        The square, and the boxes `[n, 4]` cxcywh in [0, 1] of it.
    """
    width, height = image.size
    window = min(width, height)
    left, top = (width - window) / 2, (height - window) / 2
    lowest, highest = (0.0, 0.0), (float(width - window), float(height - window))
    if boxes:
        x0, y0 = min(b[0] for b in boxes), min(b[1] for b in boxes)
        x1, y1 = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
        if max(x1 - x0, y1 - y0) > window:  # no square crop holds them all
            window = max(width, height)
            left, top = (width - window) / 2, (height - window) / 2
            at = None
        else:
            left, top = min(max(left, x1 - window), x0), min(max(top, y1 - window), y0)
            left, top = min(max(left, 0), width - window), min(max(top, 0), height - window)
            lowest = max(0.0, x1 - window), max(0.0, y1 - window)
            highest = min(highest[0], x0), min(highest[1], y0)
    if at is not None:
        left, top = (low + share * (high - low) for low, share, high in zip(lowest, at, highest, strict=True))
    left, top = math.floor(left + 0.5), math.floor(top + 0.5)  # whole pixels, for the picture and the boxes alike
    square = _cut(image, left, top, window, size)
    edges = [(x - left, y - top, x + w - left, y + h - top) for x, y, w, h in boxes]
    inside = torch.tensor(edges, dtype=torch.float32).reshape(-1, 4).div(window).clamp(0, 1)
    return square, xyxy_to_cxcywh(inside)


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


def _cut(image: Image.Image, left: int, top: int, window: int, size: int) -> Image.Image:
    if image.size == (size, size) and window == size:
        return image
    cropped = image.crop((left, top, left + window, top + window))  # beyond the border it is black: the letterbox
    return cropped.resize((size, size), Image.Resampling.LANCZOS)
