"""One picture of many records: each image with its boxes, and below it the caption and what the boxes are called."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from dpt_t2i.data.records import Record
from dpt_t2i.pictures import PALETTE, printable

# Told apart by eyes with any colour vision (Okabe and Ito); used in turn.
COLUMNS = 6
LINE = 14  # pixels of a line of text
LINES = 8  # lines below a picture: caption, then expressions
FONT = 11
GAP = 6


def contact_sheet(records: Sequence[Record], side: int) -> Image.Image:
    """A grid of records, `side` pixels a picture; the boxes of an expression have the colour of its text.

    Raises:
        InputError: a picture cannot be read.
    """
    columns = min(COLUMNS, max(1, len(records)))
    rows = -(-len(records) // columns)
    width, height = side + GAP, side + LINES * LINE + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for number, record in enumerate(records):
        cell = _cell(record, side)
        sheet.paste(cell, (GAP + (number % columns) * width, GAP + (number // columns) * height))
    return sheet


def _cell(record: Record, side: int) -> Image.Image:
    cell = Image.new("RGB", (side, side + LINES * LINE), "white")
    picture = record.load_image()
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    cell.paste(picture.resize(size, smooth), (0, 0))
    draw = ImageDraw.Draw(cell)
    drawn: Counter[tuple[float, ...]] = Counter()
    for number, expression in enumerate(record.expressions):
        for box in expression.boxes:
            _draw_box(draw, box, scale, drawn[box], PALETTE[number % len(PALETTE)], side)
            drawn[box] += 1
    _write(draw, record, side)
    return cell


def _draw_box(
    draw: ImageDraw.ImageDraw, box: tuple[float, ...], scale: float, ring: int, color: str, side: int
) -> None:
    """Box xywh in pixels of the picture; those of one thing are drawn around each other."""
    x, y, w, h = (scale * value for value in box)
    corners = [x - 2 * ring, y - 2 * ring, x + w + 2 * ring, y + h + 2 * ring]
    draw.rectangle([min(max(value, 0.0), side - 1.0) for value in corners], outline=color, width=2)


def _write(draw: ImageDraw.ImageDraw, record: Record, side: int) -> None:
    font = ImageFont.load_default(FONT)
    wide = max(8, int(side / 5.6))  # characters in a line
    lines = [(line, "black") for line in textwrap.wrap(record.captions[0], wide, max_lines=3, placeholder=" ...")]
    for number, expression in enumerate(record.expressions):
        color = PALETTE[number % len(PALETTE)]
        lines.extend((line, color) for line in textwrap.wrap(expression.text, wide, max_lines=2, placeholder=" ..."))
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], (f"... {len(record.expressions)} expressions in all", "black")]
    for row, (line, color) in enumerate(lines):
        draw.text((1, side + row * LINE), printable(line), fill=color, font=font)
