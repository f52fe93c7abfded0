"""One example of the scene world: a picture, what is true of it, and what is almost true of it.

Everything follows from (split, seed, index), so an example can be made again anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import copysign
from typing import Literal

import numpy as np
from numpy.random import Generator

from dpt_t2i.scenes.facts import Fact, Phrase, seen_in
from dpt_t2i.scenes.language import Caption, Category, Plan, caption, facts_of
from dpt_t2i.scenes.layout import clearly, draw_object, draw_scene, draw_shade, fits
from dpt_t2i.scenes.plans import TRAINING_MIX, draw_plan, near_plans
from dpt_t2i.scenes.referring import Referring, refer
from dpt_t2i.scenes.world import EXTENTS, Relation, Scene, SceneObject, scene_held_out

Split = Literal["train", "val", "heldout"]
_STREAMS: dict[str, int] = {"train": 11, "val": 23, "heldout": 37}


@dataclass(frozen=True)
class HardNegative:
    """A caption that is false of the example's scene by one change, and a scene of which it is true."""

    caption: Caption
    rule: str
    scene: Scene  # the example's caption is false of it


@dataclass(frozen=True)
class Example:
    """A scene with all its texts."""

    scene: Scene
    caption: Caption
    negative: HardNegative
    expressions: tuple[Referring, ...]


def example_rng(split: Split, seed: int, index: int) -> Generator:
    """The generator of one example; streams of different splits never meet."""
    return np.random.default_rng([_STREAMS[split], seed, index])


def make_example(index: int, *, seed: int = 0, split: Split = "train", category: Category | None = None) -> Example:
    """Example number `index` of a split.

    `train` and `val` hold only training compositions (they differ in their random stream);
    every caption of `heldout` names a held-out composition.
    """
    rng = example_rng(split, seed, index)
    held_out = split == "heldout"
    kind = category or _draw_category(rng, held_out)  # drawn once: a rejected scene must not thin out its category
    while True:
        plan = draw_plan(kind, rng, held_out=held_out)
        scene = stage(plan, rng)
        if scene is None or (not held_out and scene_held_out(scene)):
            continue
        told = caption(plan)
        negative = _negative(plan, told, scene, rng)
        if negative is not None:
            return Example(scene, told, negative, refer(scene, rng))


def stage(plan: Plan, rng: Generator, base: Scene | None = None) -> Scene | None:
    """A scene of which a plan is true with nothing beside it, keeping `base`'s layout as far as possible."""
    if base is not None:
        kept = _restage(plan, base, rng)
        if kept is not None:
            return kept
    phrases = _cast(plan, rng)
    relation = plan.relation
    scene = draw_scene(phrases, rng, relation, base.background if base else None)
    return scene if scene is not None and true_of(facts_of(plan), scene) else None


def true_of(facts: Sequence[Fact], scene: Scene) -> bool:
    """Whether claims hold in a drawn scene."""
    seen = seen_in(scene)
    return all(fact.holds(seen) for fact in facts)


def _cast(plan: Plan, rng: Generator) -> list[Phrase]:
    """The phrases of the objects to draw; three and four things are small more often, so that they fit."""
    phrases = [m.phrase for m in plan.mentions]
    if plan.count is not None:
        phrases = phrases * plan.count
    crowded = len(phrases) > 2 and rng.random() < 0.7
    return [replace(p, size="small") if crowded and p.size is None else p for p in phrases]


def _restage(plan: Plan, base: Scene, rng: Generator) -> Scene | None:
    """Change as little of `base` as makes the plan true: recast in place, swap or turn places, add or drop things."""
    objects = list(base.objects)
    wanted = [m.phrase for m in plan.mentions] * (1 if plan.count is None else plan.count)
    while len(objects) > len(wanted):
        objects.pop(int(rng.integers(len(objects))))
    for index, phrase in enumerate(wanted):
        if index < len(objects):
            objects[index] = _recast(objects[index], phrase, rng)
        else:
            sizes = {o.size for o in objects}
            objects.append(draw_object(replace(phrase, size=phrase.size or sorted(sizes)[-1]), rng))
    if plan.relation is not None and not clearly(plan.relation, objects[0], objects[1]):
        a, b = objects
        exchanged = [replace(a, cx=b.cx, cy=b.cy), replace(b, cx=a.cx, cy=a.cy)]
        objects = exchanged if clearly(plan.relation, *exchanged) else _turn(plan.relation, a, b)
        if not clearly(plan.relation, objects[0], objects[1]):
            return None
    scene = Scene(tuple(objects), base.background)
    return scene if fits(objects) and true_of(facts_of(plan), scene) else None


def _turn(relation: Relation, a: SceneObject, b: SceneObject) -> list[SceneObject]:
    """Both about the middle between them, so that a stands `relation` of b and still a little where it stood before."""
    dx, dy = a.cx - b.cx, a.cy - b.cy
    short, long = sorted((abs(dx), abs(dy)))
    far = long if relation in ("right", "below") else -long
    x, y = (far, copysign(short, dy)) if relation in ("left", "right") else (copysign(short, dx), far)
    middle_x, middle_y = (a.cx + b.cx) / 2, (a.cy + b.cy) / 2
    return [
        replace(a, cx=middle_x + x / 2, cy=middle_y + y / 2),
        replace(b, cx=middle_x - x / 2, cy=middle_y - y / 2),
    ]


def _recast(thing: SceneObject, phrase: Phrase, rng: Generator) -> SceneObject:
    """The same place with the phrase's shape, colour and size."""
    if phrase.color not in (None, thing.color):
        thing = replace(thing, color=str(phrase.color), rgb=draw_shade(str(phrase.color), rng))
    if phrase.size not in (None, thing.size):
        thing = replace(thing, size=str(phrase.size), extent=float(rng.uniform(*EXTENTS[str(phrase.size)])))
    return replace(thing, shape=phrase.shape)


def _negative(plan: Plan, told: Caption, scene: Scene, rng: Generator) -> HardNegative | None:
    for near, rule in near_plans(plan, rng):
        false_text = caption(near)
        if true_of(false_text.facts, scene):
            continue
        for _ in range(3):
            other = stage(near, rng, base=scene)
            if other is None or scene_held_out(other) or true_of(told.facts, other):
                continue
            return HardNegative(false_text, rule, other)
    return None


def _draw_category(rng: Generator, held_out: bool) -> Category:
    mix = {
        k: v for k, v in TRAINING_MIX.items() if not held_out or k not in ("single_object", "two_objects", "several")
    }
    names = list(mix)
    weights = np.array([mix[name] for name in names])
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]
