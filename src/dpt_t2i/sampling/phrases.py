"""The things that a prompt names, by a small rule: split at joining and relating words, drop what stands before."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SIDES = "left|right"
BREAKS = re.compile(
    r"[,;.]"
    rf"|\b(?:(?:to|on)\s+the\s+)?(?:{_SIDES})(?:\s+side)?\s+of\b"
    r"|\b(?:on\s+top\s+of|in\s+front\s+of|next\s+to|close\s+to|higher\s+than|lower\s+than|together\s+with|and\s+also)\b"
    r"|\b(?:and|with|above|over|below|under|beneath|beside|behind|near|inside|between|on|in|at)\b",
    re.IGNORECASE,
)
# "a photo of", "an image showing": names the picture, not a thing in it
PICTURE = re.compile(
    r"\s*(?:(?:an?|the)\s+)?(?:photo|photograph|picture|image|drawing|painting|scene|view)\s+(?:of|with|showing)\b",
    re.IGNORECASE,
)
NUMBERS = "one|two|three|four|five|six|seven|eight|nine|ten|some|several|many|all"
DETERMINERS = re.compile(rf"(?:\s*\b(?:an?|the|exactly|{NUMBERS}|\d+)\b)*\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Phrase:
    """A piece of a prompt that names a thing."""

    text: str
    span: tuple[int, int]  # characters [start, end) of the prompt, without article and number


def split_phrases(prompt: str) -> list[Phrase]:
    """ "a photo of two red circles left of a cross" -> "red circles", "cross". A prompt in which nothing is left is one
    phrase."""
    opening = PICTURE.match(prompt)
    start, found = opening.end() if opening else 0, []
    for cut in [*BREAKS.finditer(prompt, start), None]:
        end = cut.start() if cut else len(prompt)
        phrase = _trim(prompt, start, end)
        if phrase is not None:
            found.append(phrase)
        start = cut.end() if cut else end
    whole = prompt.strip()
    return found or [Phrase(whole, (prompt.find(whole), prompt.find(whole) + len(whole)))]


def _trim(prompt: str, start: int, end: int) -> Phrase | None:
    head = DETERMINERS.match(prompt, start, end)
    start = head.end() if head else start
    text = prompt[start:end].rstrip()
    return Phrase(text, (start, start + len(text))) if re.search(r"\w", text) else None
