"""From words back to facts: what a caption in the world's templates claims, whoever wrote it."""

from __future__ import annotations

import re

from dpt_t2i.scenes.facts import Fact, Phrase
from dpt_t2i.scenes.language import (
    COLOR_WORDS,
    COUNT_WORDS,
    JOINS,
    PREFIXES,
    RELATION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
)
from dpt_t2i.scenes.world import Relation

_SHAPES = {form: shape for shape, pairs in SHAPE_WORDS.items() for pair in pairs for form in pair}
_COLORS = {word: color for color, words in COLOR_WORDS.items() for word in words}
_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}
_RELATIONS: dict[str, Relation] = {word: side for side, words in RELATION_WORDS.items() for word in words}
_RELATIONS |= {"on top of": "above", "underneath": "below"}
_COUNTS = {word: count for count, words in COUNT_WORDS.items() for word in words}
_COUNTS |= {f"{exactly}{word}": 5 for exactly in ("", "exactly ") for word in ("five", "5")}


def _any_of(words: object) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))  # type: ignore[call-overload]


_PREFIX = re.compile(_any_of(filter(None, PREFIXES)))
_RELATION = re.compile(rf" ({_any_of(_RELATIONS)}) (?=an? )")
_JOIN = re.compile(rf"(?:{_any_of(JOINS)}|, )(?=an? )")
_COUNTED = re.compile(rf"({_any_of(_COUNTS)}) (.+)")
_ARTICLE = re.compile(r"an? ")


def read_facts(text: str) -> tuple[Fact, ...]:
    """The claims of a caption as `language.caption` writes them; a word from outside the world matches no thing.

    Raises:
        ValueError: the text is built in another way.
    """
    body = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    counted = _COUNTED.fullmatch(body)
    if counted is not None:
        return (Fact("count", _phrase(counted[2]), count=_COUNTS[counted[1]]),)
    relation = _RELATION.search(body)
    if relation is None:
        return tuple(Fact("exists", _named(part)) for part in _JOIN.split(body))
    first, second = _named(body[: relation.start()]), _named(body[relation.end() :])
    side = Fact("relation", first, relation=_RELATIONS[relation[1]], other=second)
    return (Fact("exists", first), Fact("exists", second), side)


def _named(text: str) -> Phrase:
    if not _ARTICLE.match(text):
        raise ValueError(f"{text!r} does not begin with an article")
    return _phrase(_ARTICLE.sub("", text, count=1))


def _phrase(text: str) -> Phrase:
    """`tiny scarlet disc` -> small, red, circle."""
    *before, last = text.split()
    size = color = None
    while before and before[0] in {*_SIZES, *_COLORS}:
        word = before.pop(0)
        size, color = _SIZES.get(word, size), _COLORS.get(word, color)
    shape = " ".join([*before, last])
    return Phrase(_SHAPES.get(shape, shape), color, size)
