"""What a prompt claims, and whether a list of seen objects bears it out.

The same judge serves the truth of a drawn scene and the checker's reading of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from dpt_t2i.scenes.world import Box, Relation, Scene, relation_between


@dataclass(frozen=True)
class Seen:
    """An object as it was drawn or detected; an attribute that could not be told is None and matches no claim."""

    shape: str | None
    color: str | None
    size: str | None
    box: Box  # xyxy, any unit that is the same for all objects of an image


@dataclass(frozen=True)
class Phrase:
    """Part of a claim: "a small red circle"; None leaves the attribute open."""

    shape: str
    color: str | None = None
    size: str | None = None

    def matches(self, seen: Seen) -> bool:
        return self.shape == seen.shape and self.color in (None, seen.color) and self.size in (None, seen.size)


@dataclass(frozen=True)
class Fact:
    """One claim: a thing exists, a number of things is exact, or one thing lies on a side of another."""

    kind: Literal["exists", "count", "relation"]
    phrase: Phrase
    count: int = 1  # of `count`
    relation: Relation | None = None  # of `relation`
    other: Phrase | None = None  # of `relation`

    def holds(self, seen: Sequence[Seen]) -> bool:
        hits = [s for s in seen if self.phrase.matches(s)]
        if self.kind == "exists":
            return bool(hits)
        if self.kind == "count":
            return len(hits) == self.count
        assert self.other is not None
        others = [s for s in seen if self.other.matches(s)]
        return any(a is not b and relation_between(a.box, b.box) == self.relation for a in hits for b in others)

    def __str__(self) -> str:
        name = _words(self.phrase)
        if self.kind == "exists":
            return f"there is a {name}"
        if self.kind == "count":
            return f"there are exactly {self.count} of {name}"
        assert self.other is not None
        side = {"left": "left of", "right": "right of", "above": "above", "below": "below"}[self.relation or "left"]
        return f"{name} is {side} {_words(self.other)}"


@dataclass(frozen=True)
class Verdict:
    """Fact by fact; a prompt is right when all its facts are."""

    facts: tuple[tuple[Fact, bool], ...]
    extra_objects: int  # seen, but not asked for
    seen: tuple[Seen, ...]

    @property
    def correct(self) -> bool:
        return all(ok for _, ok in self.facts)


def judge(facts: Sequence[Fact], seen: Sequence[Seen]) -> Verdict:
    """Hold claims against seen objects. Extra objects are allowed, and counted."""
    return Verdict(
        facts=tuple((fact, fact.holds(seen)) for fact in facts),
        extra_objects=len(seen) - _asked_for(facts, seen),
        seen=tuple(seen),
    )


def _asked_for(facts: Sequence[Fact], seen: Sequence[Seen]) -> int:
    """How many seen objects the claims account for: the largest matching of objects to the things that were named."""
    named = [fact.phrase for fact in facts if fact.kind != "relation" for _ in range(fact.count)]
    if not named or not seen:
        return 0
    fits = np.array([[phrase.matches(thing) for thing in seen] for phrase in named], dtype=float)
    rows, columns = linear_sum_assignment(fits, maximize=True)
    return int(fits[rows, columns].sum())


def seen_in(scene: Scene) -> list[Seen]:
    """The truth of a drawn scene, boxes in fractions of the side."""
    return [Seen(o.shape, o.color, o.size, o.box) for o in scene.objects]


def _words(phrase: Phrase) -> str:
    return " ".join(word for word in (phrase.size, phrase.color, phrase.shape) if word)
