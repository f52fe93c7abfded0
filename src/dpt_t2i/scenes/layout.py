"""Drawing lots: where objects stand, what they look like, and on what ground."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache

from numpy.random import Generator

from dpt_t2i.scenes.facts import Phrase
from dpt_t2i.scenes.world import (
    COLORS,
    EXTENTS,
    GROUND_KINDS,
    OPPOSITE,
    SHAPES,
    SIZES,
    Background,
    Box,
    Relation,
    Scene,
    SceneObject,
    pair_held_out,
    relation_between,
    unit_box,
)

BORDER = 0.03  # free margin of the image, fraction of the side
GAP = 0.045  # free space between boxes: two pixels of blur each at 64 px
CLEAR = 1.3  # a relation that a caption tells has its axis longer than the other by this factor


def random_phrase(rng: Generator, *, held_out: bool = False, shapes: Sequence[str] = SHAPES) -> Phrase:
    """A coloured shape, from the training split or from the held-out one."""
    pairs = _pairs(tuple(shapes), held_out)
    color, shape = pairs[int(rng.integers(len(pairs)))]
    return Phrase(shape, color)


def draw_shade(color: str, rng: Generator) -> tuple[int, int, int]:
    """A shade of a named colour: hue within 5 degrees, saturation and value within 0.06."""
    h, s, v = _hsv(color)
    if s > 0.2:
        h += rng.uniform(-5, 5) / 360
        s = min(1.0, s + rng.uniform(-0.06, 0.06))
    v = min(1.0, max(0.0, v + rng.uniform(-0.06, 0.06) * (0.5 if s <= 0.2 else 1.0)))
    r, g, b = colorsys.hsv_to_rgb(h % 1.0, s, v)
    return (round(255 * r), round(255 * g), round(255 * b))


def draw_background(rng: Generator) -> Background:
    """A ground of low saturation (<= 0.1) and middle brightness (0.42 to 0.74)."""
    kind = GROUND_KINDS[int(rng.integers(4))]
    hue, saturation, value = rng.random(), rng.uniform(0.0, 0.1), rng.uniform(0.45, 0.71)
    shift = rng.uniform(-0.1, 0.1) if kind == "gradient" else rng.uniform(-0.05, 0.05)
    second = min(0.74, max(0.42, value + shift))
    return Background(
        kind=kind,
        first=_rgb(hue, saturation, value),
        second=_rgb(hue, saturation, second),
        angle=float(rng.uniform(0, 360)),
        seed=int(rng.integers(2**31)),
    )


def draw_object(phrase: Phrase, rng: Generator) -> SceneObject:
    """An object of the phrase's shape, colour and size (drawn where open), anywhere inside the border."""
    size = phrase.size or SIZES[int(rng.integers(2))]
    color = phrase.color
    if color is None:
        allowed = _training_colors(phrase.shape)
        color = allowed[int(rng.integers(len(allowed)))]
    extent, rotation = rng.uniform(*EXTENTS[size]), rng.uniform(-12, 12)
    shade = draw_shade(color, rng)
    x0, y0, x1, y1 = (extent * edge for edge in unit_box(phrase.shape, rotation))
    return SceneObject(
        shape=phrase.shape,
        color=color,
        size=size,
        cx=rng.uniform(BORDER - x0, 1 - BORDER - x1),
        cy=rng.uniform(BORDER - y0, 1 - BORDER - y1),
        extent=extent,
        rotation=rotation,
        rgb=shade,
    )


def draw_scene(
    phrases: Sequence[Phrase],
    rng: Generator,
    relation: Relation | None = None,
    background: Background | None = None,
) -> Scene | None:
    """A scene of one object a phrase, in order, or None if no free place was found.

    With `relation`, object 0 stands there as seen from object 1, clearly (factor 1.3).
    """
    objects: list[SceneObject] = []
    for phrase in phrases:
        placed = _place(phrase, objects, rng, relation)
        if placed is None:
            return None
        objects.append(placed)
    return Scene(tuple(objects), background or draw_background(rng))


def fits(objects: Sequence[SceneObject]) -> bool:
    """Inside the border, and apart from each other."""
    for i, a in enumerate(objects):
        x0, y0, x1, y1 = a.box
        if min(x0, y0) < BORDER - 1e-9 or max(x1, y1) > 1 - BORDER + 1e-9:
            return False
        if any(_close(a.box, b.box) for b in objects[i + 1 :]):
            return False
    return True


def clearly(relation: Relation, a: SceneObject, b: SceneObject) -> bool:
    """Whether a stands `relation` of b by a margin that nobody would dispute."""
    if relation_between(a.box, b.box) != relation:
        return False
    dx = abs(a.box[0] + a.box[2] - b.box[0] - b.box[2])
    dy = abs(a.box[1] + a.box[3] - b.box[1] - b.box[3])
    return dx > CLEAR * dy if relation in ("left", "right") else dy > CLEAR * dx


def _place(
    phrase: Phrase, objects: Sequence[SceneObject], rng: Generator, relation: Relation | None
) -> SceneObject | None:
    for _ in range(40):
        candidate = draw_object(phrase, rng)
        if any(_close(candidate.box, other.box) for other in objects):
            continue
        if relation is not None and objects and not clearly(OPPOSITE[relation], candidate, objects[0]):
            continue
        return candidate
    return None


def _close(a: Box, b: Box) -> bool:
    return a[0] - GAP < b[2] and b[0] - GAP < a[2] and a[1] - GAP < b[3] and b[1] - GAP < a[3]


@lru_cache
def _pairs(shapes: tuple[str, ...], held_out: bool) -> list[tuple[str, str]]:
    return [(color, shape) for color in COLORS for shape in shapes if pair_held_out(color, shape) == held_out]


@lru_cache
def _training_colors(shape: str) -> list[str]:
    return [color for color in COLORS if not pair_held_out(color, shape)]


@lru_cache
def _hsv(color: str) -> tuple[float, float, float]:
    return colorsys.rgb_to_hsv(*(channel / 255 for channel in COLORS[color]))


def _rgb(h: float, s: float, v: float) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(h, s, v)
    return (round(255 * r), round(255 * g), round(255 * b))
