"""Boxes with their labels, and a verdict, drawn on a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from dpt_t2i.pictures import PALETTE

RIGHT, WRONG = "#1a7f37", "#c62828"
SIDE = 512  # pixels that the longer side is brought to, if it has fewer
FONT = 16


@dataclass(frozen=True)
class Mark:
    """One box on the picture."""

    box: tuple[float, float, float, float]  # xyxy in pixels of the picture
    label: str


def annotate(image: Image.Image, marks: Sequence[Mark], verdict: bool | None = None, side: int = SIDE) -> Image.Image:
    """The picture with `marks`; a small one is enlarged by whole pixels first, so that the labels can be read.

    Args:
        verdict: True draws a green frame with a tick, False a red one with a cross, None nothing.

    Returns:
        A new RGB picture.
    """
    factor = max(1, side // max(image.size))
    size = (image.width * factor, image.height * factor)
    canvas = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT)
    width = max(2, max(size) // 170)
    for index, mark in enumerate(marks):
        corners = _inside([value * factor for value in mark.box], size)
        draw.rectangle(corners, outline=PALETTE[index % len(PALETTE)], width=width)
    for index, mark in enumerate(marks):  # after all boxes, so that no line crosses a label
        corners = _inside([value * factor for value in mark.box], size)
        _label(draw, mark.label, corners, PALETTE[index % len(PALETTE)], font, size)
    if verdict is not None:
        _stamp(draw, verdict, size, width)
    return canvas


def _inside(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Corners clipped to the canvas and put in order."""
    x0, x1 = sorted(min(max(value, 0.0), size[0] - 1.0) for value in (box[0], box[2]))
    y0, y1 = sorted(min(max(value, 0.0), size[1] - 1.0) for value in (box[1], box[3]))
    return x0, y0, x1, y1


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    corners: tuple[float, float, float, float],
    color: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """White on the box's colour: above the box, or just inside where there is no room."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 8, bottom - top + 8
    x = max(0.0, min(corners[0], size[0] - width))
    y = corners[1] - height if corners[1] >= height else corners[1]
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + 4 - left, y + 4 - top), text, fill="white", font=font)


def _stamp(draw: ImageDraw.ImageDraw, right: bool, size: tuple[int, int], width: int) -> None:
    color = RIGHT if right else WRONG
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=color, width=2 * width)
    unit = max(size) // 12
    x, y = size[0] - unit - 3 * width, size[1] - unit - 3 * width
    draw.rectangle((x, y, x + unit, y + unit), fill=color)
    tick = [(0.2, 0.55), (0.42, 0.78), (0.82, 0.25)]
    crosses = [[(0.25, 0.25), (0.75, 0.75)], [(0.25, 0.75), (0.75, 0.25)]]
    for line in [tick] if right else crosses:
        draw.line([(x + a * unit, y + b * unit) for a, b in line], fill="white", width=width + 1)
