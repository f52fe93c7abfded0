"""The checker: says from pixels alone what stands in an image, and which claims of a prompt hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dpt_t2i.errors import InputError
from dpt_t2i.scenes.facts import Fact, Seen, Verdict, judge
from dpt_t2i.scenes.segment import DULL, HUED, HUES, Floats, Region, hue_of, regions
from dpt_t2i.scenes.shapes import fit_shape
from dpt_t2i.scenes.world import COLORS, LARGE_FROM

LEAST_SIDE = 32  # pixels
READING_SIDE = 96  # larger images are made this small first
EXTENTS_SEEN = (0.13, 0.56)  # a thing outside this range is none of the world's (0.24 to 0.44)
HUE_REACH = 30  # degrees around a colour's hue
SOLID = 0.7  # how far a shade must lie from the ground towards its colour: drawn ones 0.8 or more, a half-faded one 0.5


def check(image: Image.Image, facts: Sequence[Fact]) -> Verdict:
    """Hold a prompt's claims against an image; the errors of `detect`."""
    return judge(facts, detect(image))


def detect(image: Image.Image) -> list[Seen]:
    """The things in a square image, largest first; boxes are xyxy in fractions of the side.

    A thing whose shade is none of the world's colours, or that fits no shape well, is still listed, with None for what
    could not be told. Its size is told by the extent of the best template, which blur changes less than a box's sides.

    Raises:
        InputError: the image cannot be read, is not square, or has fewer than 32 pixels a side.
    """
    pixels = _pixels(image)
    return [_seen(region, len(pixels)) for region in regions(pixels)]


def name_color(shade: Floats, ground: Floats) -> str | None:
    """The colour that a shade [3], 0..255, is clearly one of, given the ground [3] behind it; None if it is faded."""
    if np.ptp(shade) < DULL:
        name = "black" if shade.mean() < ground.mean() else "white"
    else:
        apart = np.abs(hue_of(shade) - HUES)
        apart = np.minimum(apart, 360 - apart)
        if apart.min() > HUE_REACH:
            return None
        name = HUED[int(apart.argmin())]
    way = np.array(COLORS[name], dtype=np.float32) - ground  # from the ground to the colour's mean shade
    return name if (shade - ground) @ way >= SOLID * (way @ way) else None


def _pixels(image: Image.Image) -> Floats:
    """RGB [side, side, 3], 0..255."""
    width, height = image.size
    if width != height or width < LEAST_SIDE:
        raise InputError(f"image of {width} x {height} pixels: the checker reads square ones of {LEAST_SIDE} or more")
    try:
        rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"image cannot be read ({error}); write it again as PNG") from error
    if width > READING_SIDE:
        rgb = rgb.resize((READING_SIDE, READING_SIDE), Image.Resampling.BOX)
    return np.asarray(rgb, dtype=np.float32)


def _seen(region: Region, side: int) -> Seen:
    found = fit_shape(region.coverage, side)
    shift = np.array([region.left, region.top] * 2)
    x0, y0, x1, y1 = np.clip((found.box + shift) / side, 0, 1).tolist()
    color = name_color(region.shade, region.ground)
    real = color is not None and EXTENTS_SEEN[0] <= found.extent <= EXTENTS_SEEN[1]
    size = "large" if found.extent >= LARGE_FROM else "small"
    return Seen(found.shape if real else None, color, size, (x0, y0, x1, y1))
