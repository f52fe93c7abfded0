"""Referring expressions: texts that name one thing of a scene (or all of a kind), with boxes and the naming words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator

from dpt_t2i.scenes.facts import Phrase, Seen, seen_in
from dpt_t2i.scenes.language import COUNT_WORDS, RELATION_WORDS, Mention
from dpt_t2i.scenes.world import Box, Relation, Scene, relation_between

EXTREMES: dict[Relation, tuple[str, ...]] = {
    "left": ("on the left", "furthest to the left"),
    "right": ("on the right", "furthest to the right"),
    "above": ("at the top", "highest up"),
    "below": ("at the bottom", "lowest down"),
}
EXTREME_MARGIN = 0.08  # of the side: how far ahead of the next one a thing must be to be "on the left"


@dataclass(frozen=True)
class Referring:
    """A text and the things that it names."""

    text: str
    span: tuple[int, int]  # [start, end) of the naming words, article excluded
    boxes: tuple[Box, ...]  # xyxy, fractions of the side; the nominal target first


def refer(scene: Scene, rng: Generator, most: int = 4) -> tuple[Referring, ...]:
    """Up to `most` expressions in random order; at least one for every scene that shows anything."""
    seen = seen_in(scene)
    found: list[Referring] = []
    for index in rng.permutation(len(seen)).tolist():
        found.extend(_of_one(seen, index, rng))
    found.extend(_of_all(seen, rng))
    order = rng.permutation(len(found))[:most]
    return tuple(found[i] for i in order)


def _of_one(seen: Sequence[Seen], index: int, rng: Generator) -> list[Referring]:
    target = seen[index]
    found = []
    for phrase in _phrases(target):
        hits = [s for s in seen if phrase.matches(s)]
        if len(hits) == 1:
            found.append(_text("the ", phrase, "", (target.box,), rng))
        else:
            found.extend(_by_extreme(phrase, target, hits, rng))
        found.extend(_by_neighbour(phrase, index, seen, rng))
    return found


def _phrases(target: Seen) -> list[Phrase]:
    shape = str(target.shape)
    return [
        Phrase(shape),
        Phrase(shape, target.color),
        Phrase(shape, size=target.size),
        Phrase(shape, target.color, target.size),
    ]


def _by_extreme(phrase: Phrase, target: Seen, hits: Sequence[Seen], rng: Generator) -> list[Referring]:
    found = []
    for relation, words in EXTREMES.items():
        axis = 0 if relation in ("left", "right") else 1
        sign = 1 if relation in ("left", "above") else -1
        place = [sign * (s.box[axis] + s.box[axis + 2]) / 2 for s in hits]
        mine = sign * (target.box[axis] + target.box[axis + 2]) / 2
        if all(s is target or p > mine + EXTREME_MARGIN for s, p in zip(hits, place, strict=True)):
            tail = " " + words[int(rng.integers(len(words)))]
            found.append(_text("the ", phrase, tail, (target.box,), rng))
    return found


def _by_neighbour(phrase: Phrase, index: int, seen: Sequence[Seen], rng: Generator) -> list[Referring]:
    """ "the red circle left of the square", where exactly one pair of things fits the words."""
    found = []
    for other_index, other in enumerate(seen):
        relation = None if other_index == index else relation_between(seen[index].box, other.box)
        if relation is None:
            continue
        landmark = Phrase(str(other.shape), other.color if rng.random() < 0.6 else None)
        pairs = [
            (a, b)
            for a in seen
            for b in seen
            if a is not b and phrase.matches(a) and landmark.matches(b) and relation_between(a.box, b.box) == relation
        ]
        if len(pairs) != 1:
            continue
        words = RELATION_WORDS[relation]
        tail = f" {words[int(rng.integers(len(words)))]} the {_mention(landmark, rng).words()}"
        found.append(_text("the ", phrase, tail, (seen[index].box,), rng))
    return found


def _of_all(seen: Sequence[Seen], rng: Generator) -> list[Referring]:
    """ "the two crosses": every thing of a kind, where there are several."""
    found = []
    for phrase in {p: None for s in seen for p in _phrases(s)[:2]}:
        hits = [s for s in seen if phrase.matches(s)]
        if len(hits) > 1:
            head = f"the {COUNT_WORDS[len(hits)][0]} " if rng.random() < 0.7 else "all the "
            found.append(_text(head, phrase, "", tuple(s.box for s in hits), rng, plural=True))
    return found


def _mention(phrase: Phrase, rng: Generator) -> Mention:
    a, b, c = (0 if rng.random() < 0.75 else int(rng.integers(1, 12)) for _ in range(3))
    return Mention(phrase, a, b, c)


def _text(
    head: str, phrase: Phrase, tail: str, boxes: tuple[Box, ...], rng: Generator, plural: bool = False
) -> Referring:
    words = _mention(phrase, rng).words(plural)
    return Referring(head + words + tail, (len(head), len(head) + len(words)), boxes)
