"""One picture of a generation folder: a row a prompt, a column a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dpt_t2i.pictures import printable

THUMBNAIL = 128  # pixels of a cell's side
CAPTION = 14  # pixels of a row's caption
MAX_ROWS, MAX_COLUMNS = 24, 8  # the sheet is for a glance; the folder holds the rest


def contact_sheet(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Thumbnails of the images in `rows` of a manifest, each row of the sheet under its prompt."""
    prompts = {row["prompt_index"]: row["prompt"] for row in rows}
    indices = list(prompts)[:MAX_ROWS]
    seeds = sorted({row["seed"] for row in rows})[:MAX_COLUMNS]
    sheet = Image.new("RGB", (len(seeds) * THUMBNAIL, len(indices) * (THUMBNAIL + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, index in enumerate(indices):
        draw.text((2, line * (THUMBNAIL + CAPTION) + 1), printable(prompts[index]), fill="black")
    for row in rows:
        if row["prompt_index"] in indices and row["seed"] in seeds:
            left = seeds.index(row["seed"]) * THUMBNAIL
            top = indices.index(row["prompt_index"]) * (THUMBNAIL + CAPTION) + CAPTION
            sheet.paste(_thumbnail(folder / row["file"]), (left, top))
    return sheet


def _thumbnail(path: Path) -> Image.Image:
    """The image scaled to fit a cell; small ones grow by whole pixels, so that they stay sharp."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if max(image.size) <= THUMBNAIL:
        factor = THUMBNAIL // max(image.size)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
