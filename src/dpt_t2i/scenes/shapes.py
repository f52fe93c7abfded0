"""Which shape a coverage mask has: it is laid over drawn templates of every shape, turned and blurred.

Mask and templates are brought to one place and size by their centre of mass and their area, which blur leaves alone
(a bounding box would move with every stray pixel).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from dpt_t2i.scenes.segment import Floats, firm
from dpt_t2i.scenes.world import SHAPES, Box, unit_outline

GRID = 28  # cells across the common grid
SPAN = 2.4  # its width in units of the root of the shape's area; the triangle's tip lies 0.89 from its centre of mass
TURNS = tuple(range(-15, 16, 3))  # degrees; things are drawn within 12
BLURS = (0.02, 0.05, 0.08, 0.11, 0.15, 0.2)  # sigma in units of extent; 0.1 is 1.7 pixels on a small thing at 64
LEAST_FIT = 0.9  # overlap with the best template; drawn things have 0.97 or more, and 0.94 or more if stretched by 1.15
USUAL = (0.21, 0.49)  # extents, fractions of the side, that the world draws (0.24 to 0.44), and a little beyond
UNUSUAL_COST = 0.015  # of overlap; it tells a small cross with worn arms from a circle smaller than any
LEAST_LEAD = (0.004, 0.3)  # the best of another shape is worse by this much, and by this share of the best one's misfit


@dataclass(frozen=True)
class Fit:
    """How the best template lies over a mask."""

    shape: str | None  # None: no template fits, or two shapes fit as well
    overlap: float  # with the best template, 0..1
    lead: float  # by how much it is better than the best of another shape
    extent: float  # of the best template, fraction of the side, see SceneObject.extent
    box: Box  # xyxy of the best template's outline, in the mask's pixels


@dataclass(frozen=True)
class _Templates:
    masks: Floats  # [n, GRID * GRID]
    squares: Floats  # [n]: sum of squares of each mask
    shapes: NDArray[np.int64]  # [n]: index in SHAPES
    extents: Floats  # [n]: extent in units of the root of the mask's area
    boxes: Floats  # [n, 4]: xyxy of the outline around the centre of mass, in the same unit


def fit_shape(coverage: Floats, side: int) -> Fit:
    """Find the shape of a thing that covers the share `coverage` [h, w], 0..1, of pixels of a `side` x `side` image."""
    cx, cy, unit = _place(coverage)
    mask, bank = _sample(coverage, cx, cy, unit), _templates()
    common = bank.masks @ mask
    overlaps = common / (bank.squares + mask @ mask - common)  # intersection over union of soft masks (Tanimoto)
    extents = bank.extents * (unit / side)
    overlaps -= UNUSUAL_COST * ((extents < USUAL[0]) | (extents > USUAL[1]))
    best = int(overlaps.argmax())
    overlap = float(overlaps[best])
    lead = overlap - float(overlaps[bank.shapes != bank.shapes[best]].max())
    told = overlap >= LEAST_FIT and lead >= max(LEAST_LEAD[0], LEAST_LEAD[1] * (1 - overlap))
    x0, y0, x1, y1 = (bank.boxes[best] * unit).tolist()
    return Fit(
        shape=SHAPES[bank.shapes[best]] if told else None,
        overlap=overlap,
        lead=lead,
        extent=float(extents[best]),
        box=(cx + x0, cy + y0, cx + x1, cy + y1),
    )


def _place(coverage: Floats) -> tuple[float, float, float]:
    """Centre of mass (x, y) and root of the area, in pixels; a pixel's centre lies at its index + 0.5."""
    rows, columns = coverage.sum(axis=1), coverage.sum(axis=0)
    area = max(float(rows.sum()), 1e-6)  # an empty mask has no shape, and no NaN
    cx = float(columns @ (np.arange(len(columns)) + 0.5)) / area
    cy = float(rows @ (np.arange(len(rows)) + 0.5)) / area
    return cx, cy, math.sqrt(area)


def _sample(coverage: Floats, cx: float, cy: float, unit: float) -> Floats:
    """The mask on the common grid, [GRID * GRID]."""
    steps = ((np.arange(GRID) + 0.5) / GRID - 0.5) * SPAN * unit - 0.5
    points = np.broadcast_arrays((cy + steps)[:, None], (cx + steps)[None, :])
    sampled: Floats = ndimage.map_coordinates(coverage, points, order=1, mode="constant").ravel()
    return sampled


@lru_cache
def _templates() -> _Templates:
    masks, shapes, extents, boxes = [], [], [], []
    for index, shape in enumerate(SHAPES):
        for turn in (0,) if shape == "circle" else TURNS:
            outline = unit_outline(shape, turn)
            sharp = _draw(outline)
            for blur in BLURS:
                coverage = firm(ndimage.gaussian_filter(sharp, blur * _EXTENT))
                cx, cy, unit = _place(coverage)
                points = ((outline + 0.5 * _SIDE / _EXTENT) * _EXTENT - (cx, cy)) / unit
                masks.append(_sample(coverage, cx, cy, unit))
                shapes.append(index)
                extents.append(_EXTENT / unit)
                boxes.append([*points.min(axis=0), *points.max(axis=0)])
    bank = np.stack(masks)
    return _Templates(bank, (bank**2).sum(axis=1), np.array(shapes), np.array(extents), np.array(boxes))


_EXTENT, _SIDE = 64, 128  # pixels: a template is drawn with this extent in the middle of a square of this side


def _draw(outline: NDArray[np.float64]) -> Floats:
    """An outline of extent 1 filled, [_SIDE, _SIDE] of 0 and 1."""
    mask = Image.new("L", (_SIDE, _SIDE))
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in outline * _EXTENT + (_SIDE / 2 - 0.5)], fill=1)
    return np.asarray(mask, dtype=np.float32)
