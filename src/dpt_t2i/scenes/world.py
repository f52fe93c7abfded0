"""The things a scene is made of: colours, shapes, sizes, objects, and the compositions held out of training.

Positions and lengths are fractions of the image side; x grows to the right, y grows downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Mean shade of each colour, RGB 0..255. Hues lie >= 23 degrees apart, and black and white lie outside the range of
# brightness of any background, so that a name is never a matter of taste.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (240, 138, 28),
    "yellow": (240, 222, 50),
    "green": (48, 165, 70),
    "blue": (45, 85, 212),
    "purple": (142, 60, 182),
    "black": (22, 22, 25),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
# Longest side of an object's outline as a fraction of the image side; LARGE_FROM lies between the two ranges.
EXTENTS: dict[str, tuple[float, float]] = {"small": (0.24, 0.28), "large": (0.36, 0.44)}
LARGE_FROM = 0.32

Relation = Literal["left", "right", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATION_MARGIN = 0.1  # of the sum of both extents on the axis

GroundKind = Literal["flat", "gradient", "clouds", "stripes"]
GROUND_KINDS: tuple[GroundKind, ...] = ("flat", "gradient", "clouds", "stripes")

# Held out of everything that trains anything: VAE, text encoder, denoiser, probe, tune, and all their negatives.
HELD_OUT_PAIRS = frozenset(
    {
        ("orange", "square"),
        ("yellow", "triangle"),
        ("green", "cross"),
        ("blue", "circle"),
        ("purple", "square"),
        ("white", "triangle"),
    }
)
# (shape, relation, shape) with relation `left` or `above`; "b right of a" is the same as "a left of b".
HELD_OUT_RELATIONS: frozenset[tuple[str, Relation, str]] = frozenset(
    {
        ("triangle", "left", "square"),
        ("square", "left", "cross"),
        ("cross", "above", "circle"),
    }
)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """One drawn thing."""

    shape: str
    color: str
    size: str
    cx: float  # centre of the outline's circle, fraction of the side
    cy: float
    extent: float  # diameter of that circle (square: its side), fraction of the image side
    rotation: float  # degrees, clockwise
    rgb: tuple[int, int, int]  # the shade it is drawn in

    @cached_property
    def outline(self) -> NDArray[np.float64]:
        """Polygon [n, 2] of (x, y) in fractions of the side."""
        return unit_outline(self.shape, self.rotation) * self.extent + (self.cx, self.cy)

    @cached_property
    def box(self) -> Box:
        """Tight xyxy box of the outline, fractions of the side."""
        x0, y0, x1, y1 = unit_box(self.shape, self.rotation)
        return (
            x0 * self.extent + self.cx,
            y0 * self.extent + self.cy,
            x1 * self.extent + self.cx,
            y1 * self.extent + self.cy,
        )


@dataclass(frozen=True)
class Background:
    """A calm, greyish ground: two close shades and how they are mixed."""

    kind: GroundKind
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float  # degrees
    seed: int  # of the clouds, and of the stripes' phase


@dataclass(frozen=True)
class Scene:
    """Objects on a ground; the picture follows from it exactly, at any size."""

    objects: tuple[SceneObject, ...]
    background: Background


def unit_outline(shape: str, rotation: float = 0.0) -> NDArray[np.float64]:
    """Outline of a shape of extent 1 around the origin, turned clockwise by `rotation` degrees."""
    turn = math.radians(rotation)
    matrix = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
    return _upright(shape) @ matrix


@lru_cache(maxsize=32)  # a thing that is drawn asks several times
def unit_box(shape: str, rotation: float) -> Box:
    """Tight xyxy box of `unit_outline`."""
    outline = unit_outline(shape, rotation)
    (x0, y0), (x1, y1) = outline.min(axis=0).tolist(), outline.max(axis=0).tolist()
    return (x0, y0, x1, y1)


@lru_cache
def _upright(shape: str) -> NDArray[np.float64]:
    if shape == "circle":
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        points = 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif shape == "square":
        points = 0.45 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    elif shape == "triangle":
        points = np.array([(0, -0.5), (0.52, 0.42), (-0.52, 0.42)], dtype=float)
    elif shape == "cross":
        a, b = 0.5, 0.165
        points = np.array(
            [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        )
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return points


def relation_between(a: Box, b: Box) -> Relation | None:
    """Where `a` lies as seen from `b` (xyxy boxes of any one unit), or None if neither axis is clear.

    The centres differ by more than 0.1 of the sum of both extents on an axis, and that axis dominates.
    """
    dx = (a[0] + a[2] - b[0] - b[2]) / 2
    dy = (a[1] + a[3] - b[1] - b[3]) / 2
    if abs(dx) > abs(dy):
        span = (a[2] - a[0]) + (b[2] - b[0])
        if abs(dx) > RELATION_MARGIN * span:
            return "left" if dx < 0 else "right"
    elif abs(dy) > abs(dx):
        span = (a[3] - a[1]) + (b[3] - b[1])
        if abs(dy) > RELATION_MARGIN * span:
            return "above" if dy < 0 else "below"
    return None


def pair_held_out(color: str | None, shape: str) -> bool:
    """Whether a coloured shape belongs to the held-out split; a shape without a colour never does."""
    return (color, shape) in HELD_OUT_PAIRS


def relation_held_out(a: str, relation: Relation, b: str) -> bool:
    """Whether "shape a is `relation` of shape b" belongs to the held-out split."""
    if relation in ("right", "below"):
        a, relation, b = b, OPPOSITE[relation], a
    return (a, relation, b) in HELD_OUT_RELATIONS


def scene_held_out(scene: Scene) -> bool:
    """Whether anything in the scene, mentioned or not, belongs to the held-out split."""
    objects = scene.objects
    if any(pair_held_out(o.color, o.shape) for o in objects):
        return True
    for i, a in enumerate(objects):
        for b in objects[i + 1 :]:
            relation = relation_between(a.box, b.box)
            if relation is not None and relation_held_out(a.shape, relation, b.shape):
                return True
    return False
