"""Which captions there are: a plan for each category, and the plans that are almost it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from numpy.random import Generator

from dpt_t2i.scenes.facts import Phrase
from dpt_t2i.scenes.language import Category, Mention, Plan, dress, plan_held_out
from dpt_t2i.scenes.layout import random_phrase
from dpt_t2i.scenes.world import COLORS, HELD_OUT_RELATIONS, OPPOSITE, RELATIONS, SHAPES, SIZES, Relation

# Share of each category in training; harder categories are shown more.
TRAINING_MIX: dict[Category, float] = {
    "single_object": 0.11,
    "colors": 0.08,
    "two_objects": 0.20,
    "color_attribution": 0.20,
    "position": 0.22,
    "counting": 0.13,
    "several": 0.06,
}


def draw_plan(category: Category, rng: Generator, *, held_out: bool = False) -> Plan:
    """A random plan of a category, all in the training split, or with something held out in it.

    Raises:
        ValueError: the category names no composition that could be held out.
    """
    while True:
        plan = dress(_draw(category, rng, held_out), rng)
        if plan_held_out(plan) == held_out:
            return plan


def _draw(category: Category, rng: Generator, held_out: bool) -> Plan:
    if held_out and category in ("single_object", "two_objects"):
        raise ValueError(f"{category} names no colour or side, so nothing in it can be held out")
    if category == "single_object":
        return Plan(category, (Mention(_sized(Phrase(_shape(rng)), rng, 0.5)),))
    if category == "colors":
        return Plan(category, (Mention(_sized(random_phrase(rng, held_out=held_out), rng, 0.3)),))
    if category == "two_objects":
        first, second = rng.permutation(len(SHAPES))[:2]
        return Plan(category, (_mention(SHAPES[first], rng), _mention(SHAPES[second], rng)))
    if category == "color_attribution":
        pair = _two_phrases(rng, held_out=held_out)
        return Plan(category, tuple(Mention(phrase) for phrase in pair))
    if category == "counting":
        phrase = random_phrase(rng, held_out=held_out)
        if not held_out and rng.random() < 0.4:
            phrase = Phrase(phrase.shape)
        return Plan(category, (Mention(phrase),), count=int(rng.integers(2, 5)))
    if category == "position":
        return _draw_position(rng, held_out)
    phrases: list[Phrase] = []
    while len(phrases) < int(rng.integers(3, 5)):
        phrase = random_phrase(rng)
        if phrase not in phrases:
            phrases.append(phrase)
    return Plan(category, tuple(Mention(phrase) for phrase in phrases))


def _draw_position(rng: Generator, held_out: bool) -> Plan:
    """Two coloured or plain things with a side; held-out plans hold out the side, the colour, or both."""
    relation: Relation = RELATIONS[int(rng.integers(4))]
    if held_out and rng.random() < 0.6:
        triples = sorted(HELD_OUT_RELATIONS)
        a, relation, b = triples[int(rng.integers(len(triples)))]
        if rng.random() < 0.5:
            a, b, relation = b, a, OPPOSITE[relation]
        first, second = random_phrase(rng, shapes=[a]), random_phrase(rng, shapes=[b])
    else:
        first, second = _two_phrases(rng, held_out=held_out)
    if rng.random() < 0.35 and first.shape != second.shape:
        first, second = Phrase(first.shape), Phrase(second.shape)
    return Plan("position", (Mention(first), Mention(second)), relation=relation)


def near_plans(plan: Plan, rng: Generator) -> Iterator[tuple[Plan, str]]:
    """Hard negatives of a plan with the rule that made each, best first; none names a held-out composition."""
    candidates = [*_swaps(plan), *_replacements(plan, rng)]
    if plan.count is not None:
        others = [n for n in (plan.count - 1, plan.count + 1) if 1 <= n <= 4]
        candidates = [(replace(plan, count=n), "change_count") for n in rng.permutation(others).tolist()] + candidates
    rest = [c for c in candidates if c[1].startswith(("replace", "repeat", "drop"))]
    swaps = [c for c in candidates if c not in rest]
    for group in (swaps, rest):
        for index in rng.permutation(len(group)):
            near, rule = group[index]
            if not plan_held_out(near) and near != plan:
                yield near, rule


def _swaps(plan: Plan) -> Iterator[tuple[Plan, str]]:
    mentions = plan.mentions
    if plan.relation is not None:
        opposite = OPPOSITE[plan.relation]
        yield replace(plan, relation=opposite), "flip_relation"
        for across in RELATIONS:
            if across not in (plan.relation, opposite):
                yield replace(plan, relation=across), "turn_relation"
    for i in range(len(mentions)):
        for j in range(i + 1, len(mentions)):
            a, b = mentions[i].phrase, mentions[j].phrase
            if a.color and b.color and a.color != b.color and a.shape != b.shape:
                yield _with(plan, {i: replace(a, color=b.color), j: replace(b, color=a.color)}), "swap_colors"
            if plan.relation is not None and a != b:
                yield replace(plan, mentions=(mentions[j], mentions[i])), "swap_objects"


def _replacements(plan: Plan, rng: Generator) -> Iterator[tuple[Plan, str]]:
    index = int(rng.integers(len(plan.mentions)))
    phrase = plan.mentions[index].phrase
    taken = {m.phrase for m in plan.mentions}
    if phrase.color:
        for color in rng.permutation(list(COLORS)).tolist():
            if color != phrase.color and replace(phrase, color=color) not in taken:
                yield _with(plan, {index: replace(phrase, color=color)}), "replace_color"
    for shape in rng.permutation(SHAPES).tolist():
        if shape != phrase.shape and replace(phrase, shape=shape) not in taken:
            yield _with(plan, {index: replace(phrase, shape=shape)}), "replace_shape"
    if plan.category == "two_objects":  # what a denoiser draws that reads one of them twice
        for mention in plan.mentions:
            yield Plan("counting", (mention,), count=2), "repeat_object"
    if plan.category in ("single_object", "colors"):  # and what one draws that leaves it out, as often as the others
        for _ in range(len(SHAPES) - 1):
            yield replace(plan, count=0), "drop_object"


def _with(plan: Plan, phrases: dict[int, Phrase]) -> Plan:
    mentions = tuple(replace(m, phrase=phrases[i]) if i in phrases else m for i, m in enumerate(plan.mentions))
    return replace(plan, mentions=mentions)


def _two_phrases(rng: Generator, *, held_out: bool) -> tuple[Phrase, Phrase]:
    """Two different coloured shapes, in one case in six of one shape; at least one held out, if asked for."""
    while True:
        pair = [random_phrase(rng, held_out=held_out), random_phrase(rng)]
        a, b = (pair[int(i)] for i in rng.permutation(2))
        if a != b and (a.shape != b.shape or rng.random() < 0.35):
            return a, b


def _mention(shape: str, rng: Generator) -> Mention:
    return Mention(_sized(Phrase(shape), rng, 0.15))


def _sized(phrase: Phrase, rng: Generator, share: float) -> Phrase:
    return replace(phrase, size=SIZES[int(rng.integers(2))]) if rng.random() < share else phrase


def _shape(rng: Generator) -> str:
    return SHAPES[int(rng.integers(len(SHAPES)))]
