"""Captions that are almost true, by rule and without any model: one attribute, object, side or count is changed.

A small grammar finds the noun phrases of a caption and what joins them; a rule applies only where it is sure of the
words, so many captions of the wild get few negatives or none. By construction a negative is false wherever its caption
tells the truth about the things that it names and the words of `words.py` exclude one another; an image may still
show, unmentioned, what a `replace_*` negative names.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dpt_t2i.data import words as w
from dpt_t2i.data.records import Negative

TOKEN = re.compile(
    rf"\b(?:{'|'.join(map(re.escape, w.PHRASES))})\b|\w+(?:['’-]\w+)*|[^\w\s]", re.IGNORECASE
)  # words of one thing or one relation are one token
NAMES_A_COLOR = re.compile(r"(?!orange|gold)")  # "a man in red", but not "slices of orange"
Edit = tuple[int, str]  # token, its new text


@dataclass(frozen=True)
class Token:
    text: str
    start: int  # character

    @property
    def low(self) -> str:
        return self.text.lower()


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: tokens `[start, end)`, of which `[core, end)` follow determiner and count."""

    start: int
    core: int
    end: int
    words: tuple[str, ...]  # of the core, lower case
    leading: tuple[str, ...]  # determiner and count, lower case

    @property
    def last(self) -> int:
        return self.end - 1

    @property
    def noun(self) -> str | None:
        """The head in the singular; None if the lists do not know it, or the phrase has no noun."""
        head = self.words[-1]
        return head if head in w.NOUNS else w.PLURALS.get(head)

    @property
    def head_groups(self) -> frozenset[str]:
        return w.NOUNS[self.noun].groups if self.noun else frozenset({self.words[-1].removesuffix("s")})

    @property
    def is_plural(self) -> bool | None:
        """None where neither the head's form nor a count tells."""
        head = self.words[-1]
        if any(word in w.NUMBERS or word in "23456789" or word in ("these", "those") for word in self.leading):
            return True
        if head in w.NOUNS and head in w.PLURALS:
            return False if {"a", "an", "one"} & set(self.leading) else None
        return self.has_plural_form

    @property
    def has_plural_form(self) -> bool:
        head = self.words[-1]
        return head in w.PLURALS if self.noun else head.endswith("s") and not head.endswith(("ss", "us", "is"))

    @property
    def is_clear(self) -> bool:
        """Whether every word of it is known: `a small dog`, not `a toy dog` or `dog food`."""
        return self.noun is not None and all(word in w.ATTRIBUTES for word in self.words[:-1])

    @cached_property
    def attributes(self) -> dict[int, w.Entry]:
        """Token -> what it says of the head."""
        known = {self.core + i: w.ATTRIBUTES.get(word) for i, word in enumerate(self.words[:-1])}
        return {at: entry for at, entry in known.items() if entry is not None and entry.kind}

    def says(self) -> frozenset[frozenset[str]]:
        return frozenset(entry.groups for entry in self.attributes.values())


class Sentence:
    """A caption in tokens and noun phrases."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [Token(match[0], match.start()) for match in TOKEN.finditer(text)]
        self.low = [token.low for token in self.tokens]
        self.phrases = list(_phrases(self.low))
        self.shouts = text.isupper()
        known = (w.NOUNS.get(word) or w.NOUNS.get(w.PLURALS.get(word, "")) for word in self.low)
        nouns = {group for entry in known if entry for group in entry.groups}
        self.said = nouns | {g for word in self.low if word in w.ATTRIBUTES for g in w.ATTRIBUTES[word].groups}

    def is_before(self, word: str, phrase: Phrase) -> bool:
        return self.low[phrase.end : phrase.end + 1] == [word]

    def rewrite(self, edits: Sequence[Edit]) -> str:
        """The text with some tokens changed, in the case of their places, and articles that fit."""
        new = dict(edits)
        for at, text in edits:
            if at > 0 and self.low[at - 1] in ("a", "an"):
                new[at - 1] = w.article(text.lower())
        text = self.text
        for at in sorted(new, reverse=True):
            token = self.tokens[at]
            text = text[: token.start] + self._cased(new[at], at) + text[token.start + len(token.text) :]
        return text

    def swap(self, a: range, b: range) -> str:
        """The text with two stretches of tokens exchanged; `a` comes first."""
        first, second = (self.text[self.tokens[r[0]].start : self._end(r[-1])] for r in (a, b))
        whole = self.rewrite([(a[0], second), (b[0], first)]) if len(a) == len(b) == 1 else None
        if whole is not None:
            return whole
        begin, end = self.tokens[a[0]].start, self._end(b[-1])
        middle = self.text[self._end(a[-1]) : self.tokens[b[0]].start]
        head, tail = self.text[:begin], self.text[end:]
        second, first = self._cased(second, a[0]), self._cased(first, b[0])
        return _with_article(head, second) + _with_article(middle, first) + tail

    def _end(self, at: int) -> int:
        return self.tokens[at].start + len(self.tokens[at].text)

    def _cased(self, new: str, at: int) -> str:
        if self.shouts:
            return new.upper()
        old = self.tokens[at].text
        if old[0].isupper() and (at == 0 or not old.isupper()):
            return new[0].upper() + new[1:]
        return new if new[:2].isupper() else new[0].lower() + new[1:]


def perturb(
    caption: str, seed: int = 0, index: int | None = None, rules: Sequence[str] | None = None
) -> list[Negative]:
    """False captions, at most one of each rule, in the order of `RULES`; the same for the same arguments.

    Args:
        caption: English, one sentence.
        seed, index: of the choice among the ways in which a rule applies; without an index each caption has one of its
            own, so that no word is the false one more often than others.
        rules: names of `RULES`; None = all.
    """
    sentence = Sentence(caption)
    index = zlib.crc32(caption.encode()) if index is None else index
    found = []
    for number, (rule, candidates) in enumerate(RULES.items()):
        if rules is not None and rule not in rules:
            continue
        ways = list(dict.fromkeys(text for text in candidates(sentence) if text != caption))
        if ways:
            rng = np.random.default_rng([seed, index, number])
            found.append(Negative(ways[int(rng.integers(len(ways)))], rule))
    return found


def _swap_attributes(s: Sentence) -> Iterator[str]:
    """`a red cup and a blue plate` -> `a blue cup and a red plate`."""
    for n, first in enumerate(s.phrases):
        for second in s.phrases[n + 1 :]:
            if first.head_groups & second.head_groups:
                continue
            for a, one in first.attributes.items():
                for b, other in second.attributes.items():
                    if one.kind != other.kind or one.groups & other.groups:
                        continue
                    news = (
                        (first.head_groups, first.says() - {one.groups} | {other.groups}),
                        (second.head_groups, second.says() - {other.groups} | {one.groups}),
                    )
                    if not all(_is_said(s, heads, says) for heads, says in news):
                        yield s.rewrite([(a, s.tokens[b].text), (b, s.tokens[a].text)])


def _swap_objects(s: Sentence) -> Iterator[str]:
    """`a cat on a table` -> `a table on a cat`: only what is no longer true the other way round."""
    for first, second in zip(s.phrases, s.phrases[1:], strict=False):
        between = s.low[first.end : second.start]
        one_way = any(word in w.ONE_WAY for word in between) and all(word in w.CONNECTING for word in between)
        clear = first.is_clear and second.is_clear and first.is_plural == second.is_plural is not None
        whole = first.is_plural or (first.leading and second.leading)  # not "a man in black jacket"
        differ = not first.head_groups & second.head_groups or first.says() != second.says()
        owned = w.POSSESSIVES & {*first.leading, *second.leading}
        if one_way and clear and whole and differ and not owned and not s.is_before("of", second):
            yield s.swap(range(first.core, first.end), range(second.core, second.end))


def _flip_relation(s: Sentence) -> Iterator[str]:
    """`left of` -> `right of`, `on the table` -> `under the table`.

    Of two things of one kind the flipped relation is as true: "a dog left of another dog". And "the man on the left"
    is said where there is another one on the right, so that a bare side needs a thing of another kind beside it.
    """
    starts = {phrase.start: phrase for phrase in s.phrases}
    for at, word in enumerate(s.low):
        following = starts.get(at + 1)
        before_a_thing = following is not None and following.core > following.start
        if _relates_alike(s, at):
            continue
        if word in w.FLIPS:
            yield s.rewrite([(at, w.FLIPS[word])])
        elif word in w.BEFORE_A_THING and before_a_thing and (at == 0 or s.low[at - 1] != "all"):
            yield s.rewrite([(at, w.BEFORE_A_THING[word])])
        elif word in w.UP_AND_DOWN and before_a_thing and at > 0 and s.low[at - 1].startswith(w.MOTION):
            yield s.rewrite([(at, w.UP_AND_DOWN[word])])
        elif following is not None and following.noun is not None and before_a_thing:
            flipped = w.BY_KIND.get((word, w.NOUNS[following.noun].kind))
            if flipped:
                yield s.rewrite([(at, flipped)])


def _relates_alike(s: Sentence, at: int) -> bool:
    """Whether what the token relates may well stand the other way round too."""
    before = [phrase for phrase in s.phrases if phrase.end <= at]
    after = next((phrase for phrase in s.phrases if phrase.start > at), None)
    if s.low[at] in w.BARE_SIDES:
        return len({phrase.head_groups for phrase in s.phrases}) < 2
    if after is None or not before:
        return False
    if {"another", "other"} & {*after.leading, *after.words} or "other" in s.low[after.start : after.end + 1]:
        return True
    return any(phrase.head_groups & after.head_groups and phrase.says() == after.says() for phrase in before)


def _change_count(s: Sentence) -> Iterator[str]:
    """`three dogs` -> `four dogs`, between two and nine, so that nothing else in the sentence must agree."""
    if "both" in s.low:
        return
    for phrase in s.phrases:
        if not phrase.has_plural_form:  # not "a two door car"
            continue
        for at in range(phrase.start, phrase.core):
            names = w.NUMBERS if s.low[at] in w.NUMBERS else tuple("23456789")
            if s.low[at] in names:
                place = names.index(s.low[at])
                yield from (s.rewrite([(at, names[n])]) for n in (place - 1, place + 1) if 0 <= n < len(names))


def _replace_attribute(s: Sentence) -> Iterator[str]:
    """`a red cup` -> `a green cup`: another word of the same kind that the caption does not say."""
    for phrase in s.phrases:
        places = dict(phrase.attributes)
        alone = w.ATTRIBUTES.get(phrase.words[-1]) if len(phrase.words) == 1 == phrase.end - phrase.start else None
        if alone is not None and alone.kind == "color" and NAMES_A_COLOR.match(phrase.words[0]):
            places[phrase.last] = alone
        for at, entry in places.items():
            for word in w.ATTRIBUTE_CHOICES[entry.kind]:
                if not w.ATTRIBUTES[word].groups & (entry.groups | s.said):
                    yield s.rewrite([(at, word)])


def _replace_object(s: Sentence) -> Iterator[str]:
    """`a cat on a bed` -> `a dog on a bed`: another thing of the same kind that the caption does not name."""
    for phrase in s.phrases:
        if phrase.noun is None or not phrase.is_clear or phrase.is_plural is None:
            continue
        entry = w.NOUNS[phrase.noun]
        if entry.kind == "people" and w.GENDERED & set(s.low):  # "a woman brushing his teeth"
            continue
        if entry.kind != "containers" and s.is_before("of", phrase):  # "a plate of", but "a box of", "a basket of"
            continue
        for word in w.NOUN_CHOICES.get(entry.kind, ()):
            if not w.NOUNS[word].groups & (entry.groups | s.said):
                yield s.rewrite([(phrase.last, w.plural(word) if phrase.is_plural else word)])


RULES: dict[str, Callable[[Sentence], Iterator[str]]] = {
    "swap_attributes": _swap_attributes,
    "swap_objects": _swap_objects,
    "flip_relation": _flip_relation,
    "change_count": _change_count,
    "replace_attribute": _replace_attribute,
    "replace_object": _replace_object,
}


def _phrases(low: Sequence[str]) -> Iterator[Phrase]:
    at = 0
    while at < len(low):
        start = at
        while at < len(low) and (low[at] in w.DETERMINERS or low[at] in w.COUNTERS):
            at += 1
        core = at
        while at < len(low) and not _ends_a_phrase(low, at, core):
            at += 1
        if at > core:
            yield Phrase(start, core, at, tuple(low[core:at]), tuple(low[start:core]))
        at = max(at, start + 1)


def _ends_a_phrase(low: Sequence[str], at: int, core: int) -> bool:
    word = low[at]
    if not word[0].isalpha() or word in w.BOUNDARIES or word in w.DETERMINERS or word in w.COUNTERS:
        return True
    is_verb = word.endswith("ing") and word not in w.ING_NAMES or word.endswith("ed") and word not in w.ATTRIBUTES
    return is_verb and word not in w.NOUNS and (at > core or word.endswith("ing"))


def _is_said(s: Sentence, heads: frozenset[str], says: frozenset[frozenset[str]]) -> bool:
    """Whether the caption itself has such a thing: `a red square` after a swap, beside another red square."""
    return any(phrase.head_groups & heads and says <= phrase.says() for phrase in s.phrases)


def _with_article(before: str, core: str) -> str:
    """`before` + `core`, its article changed where it no longer fits."""
    match = re.search(r"\b(an?)(\s+)$", before, re.IGNORECASE)
    if match is None:
        return before + core
    fitting = w.article(core.lower())
    fitting = fitting.capitalize() if match[1][0].isupper() else fitting
    return before[: match.start()] + fitting + match[2] + core
