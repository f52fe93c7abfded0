"""Pictures to pixel tensors and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpt_t2i.pictures import as_rgb, read_picture

PADDING = (127, 127, 127)  # about 0 in [-1, 1]


@dataclass(frozen=True)
class Placement:
    """Where a picture lies inside the canvas that the model sees: canvas = picture * scale + (left, top), in pixels."""

    scale: float
    left: int
    top: int

    def to_picture(self, boxes: Tensor) -> Tensor:
        """xyxy boxes `[..., 4]` in canvas pixels -> pixels of the picture."""
        return (boxes - boxes.new_tensor([self.left, self.top, self.left, self.top])) / self.scale


def open_image(path: Path) -> Image.Image:
    """An image file as RGB. Raises `InputError` where it cannot be read, or is too large to be opened safely."""
    return read_picture(path, as_rgb, mend="give a PNG or JPEG file")


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in [-1, 1] (clamped) -> RGB pictures; rounds as diffusers does."""
    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)
    arrays = (unit.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(array) for array in arrays]


def letterbox(picture: Image.Image, height: int, width: int) -> tuple[Tensor, Placement]:
    """The whole picture, never squashed, centred on a grey canvas: pixels `[1, 3, height, width]` in [-1, 1]."""
    picture = as_rgb(picture, upright=False)  # boxes are told in its own pixels
    scale = min(width / picture.width, height / picture.height)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    canvas = Image.new("RGB", (width, height), PADDING)
    placement = Placement(scale, (width - size[0]) // 2, (height - size[1]) // 2)
    resized = picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
    canvas.paste(resized, (placement.left, placement.top))
    array = torch.from_numpy(np.asarray(canvas).copy())
    return array.permute(2, 0, 1)[None].float() / 127.5 - 1, placement
