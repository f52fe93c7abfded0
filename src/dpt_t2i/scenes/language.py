"""From a plan to words: captions with templates and synonyms, the facts they claim, and where each phrase stands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from numpy.random import Generator

from dpt_t2i.scenes.facts import Fact, Phrase
from dpt_t2i.scenes.world import Relation, pair_held_out, relation_held_out

T = TypeVar("T")
Category = Literal["single_object", "two_objects", "counting", "colors", "position", "color_attribution", "several"]
# The categories of the benchmark mirror GenEval; `several` (three and four things) is seen in training only.
CATEGORIES: tuple[Category, ...] = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "color_attribution",
)

SHAPE_WORDS: dict[str, tuple[tuple[str, str], ...]] = {  # (singular, plural); the first is the common one
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "cross": (("cross", "crosses"), ("plus sign", "plus signs")),
}
COLOR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "scarlet"),
    "orange": ("orange", "amber"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "black": ("black",),
    "white": ("white",),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "lower than"),
}
COUNT_WORDS: dict[int, tuple[str, ...]] = {
    0: ("no",),  # in hard negatives alone
    1: ("one", "exactly one", "1"),
    2: ("two", "exactly two", "2"),
    3: ("three", "exactly three", "3"),
    4: ("four", "exactly four", "4"),
}
PREFIXES = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "a scene with ", "a view of ")
JOINS = (" and ", " with ", " together with ", " and also ")


@dataclass(frozen=True)
class Mention:
    """A phrase with its choice of words; the word indices wrap round, so they survive a change of colour or shape."""

    phrase: Phrase
    shape_word: int = 0
    color_word: int = 0
    size_word: int = 0

    def words(self, plural: bool = False) -> str:
        parts = []
        if self.phrase.size:
            parts.append(_pick(SIZE_WORDS[self.phrase.size], self.size_word))
        if self.phrase.color:
            parts.append(_pick(COLOR_WORDS[self.phrase.color], self.color_word))
        parts.append(_pick(SHAPE_WORDS[self.phrase.shape], self.shape_word)[int(plural)])
        return " ".join(parts)


@dataclass(frozen=True)
class Plan:
    """Everything that a caption says and how it says it. A hard negative is a plan with one thing changed."""

    category: Category
    mentions: tuple[Mention, ...]
    count: int | None = None  # of `counting`, and 0 in the negative that says that a thing is not there
    relation: Relation | None = None  # of `position`: mention 0 as seen from mention 1
    prefix: int = 0
    join: int = 0
    relation_word: int = 0
    count_word: int = 0


@dataclass(frozen=True)
class Caption:
    """A text and what it claims."""

    text: str
    facts: tuple[Fact, ...]
    category: Category
    spans: tuple[tuple[int, int], ...]  # where each mention stands in `text`, [start, end), article excluded


def caption(plan: Plan) -> Caption:
    """Write a plan out."""
    text, spans = PREFIXES[plan.prefix % len(PREFIXES)], []
    for index, mention in enumerate(plan.mentions):
        if index > 0:
            text += _joint(plan, index)
        words = mention.words(plural=plan.count not in (None, 1))
        if plan.count is not None:
            text += _pick(COUNT_WORDS[plan.count], plan.count_word) + " "
        else:
            text += "an " if words[0] in "aeiou" else "a "
        spans.append((len(text), len(text) + len(words)))
        text += words
    return Caption(text, facts_of(plan), plan.category, tuple(spans))


def facts_of(plan: Plan) -> tuple[Fact, ...]:
    """The claims of a plan."""
    if plan.count is not None:
        return (Fact("count", plan.mentions[0].phrase, count=plan.count),)
    facts = [Fact("exists", mention.phrase) for mention in plan.mentions]
    if plan.relation is not None:
        first, second = (mention.phrase for mention in plan.mentions)
        facts.append(Fact("relation", first, relation=plan.relation, other=second))
    return tuple(facts)


def plan_held_out(plan: Plan) -> bool:
    """Whether the words of a plan name a held-out composition."""
    if any(pair_held_out(m.phrase.color, m.phrase.shape) for m in plan.mentions):
        return True
    if plan.relation is None:
        return False
    first, second = (mention.phrase.shape for mention in plan.mentions)
    return relation_held_out(first, plan.relation, second)


def dress(plan: Plan, rng: Generator) -> Plan:
    """Choose template and synonyms at random; the common word is taken three times in four."""
    mentions = tuple(
        replace(m, shape_word=_rare(rng), color_word=_rare(rng), size_word=_rare(rng)) for m in plan.mentions
    )
    return replace(
        plan,
        mentions=mentions,
        prefix=int(rng.integers(len(PREFIXES))),
        join=_rare(rng),
        relation_word=int(rng.integers(4)),
        count_word=_rare(rng),
    )


def _joint(plan: Plan, index: int) -> str:
    if plan.relation is not None:
        return f" {_pick(RELATION_WORDS[plan.relation], plan.relation_word)} "
    last = index == len(plan.mentions) - 1
    return _pick(JOINS, plan.join) if last else ", "


def _pick(words: tuple[T, ...], index: int) -> T:
    return words[index % len(words)]


def _rare(rng: Generator) -> int:
    return 0 if rng.random() < 0.75 else int(rng.integers(1, 12))
