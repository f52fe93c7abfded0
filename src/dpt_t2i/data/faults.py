"""Bad input of a source: each fault said once with file and record, counted, and left out only on request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dpt_t2i.data.records import Expression, Record
from dpt_t2i.errors import InputError

log = logging.getLogger(__name__)

Found = TypeVar("Found")
SHOWN = 10  # faults that the log shows; the others are counted
# What reading a broken record can raise: the wrong type, a missing key, a number out of range.
BROKEN = (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    where: str  # file and record
    reason: str


_TOLD: set[Fault] = set()  # by this process


class Faults:
    """What was wrong while a source was read.

    Args:
        on_bad: `error` raises at the first fault, `skip` leaves what is broken out and counts it.
        advice: what the error ends with, for readers whose user has no `on_bad` to set.
        quiet: somebody else says what is in `found`.
    """

    def __init__(
        self,
        on_bad: Literal["error", "skip"] = "error",
        advice: str = "mend it, or leave such records out with on_bad: skip",
        quiet: bool = False,
    ) -> None:
        self.on_bad, self.advice, self.quiet = on_bad, advice, quiet
        self.found: list[Fault] = []
        self._seen: set[Fault] = set()

    def report(self, where: str, reason: str) -> None:
        """Say it once.

        Raises:
            InputError: `on_bad` is `error`.
        """
        if self.on_bad == "error":
            raise InputError(f"{where}: {reason}; {self.advice}")
        fault = Fault(where, reason)
        if fault in self._seen:
            return
        self._seen.add(fault)
        self.found.append(fault)
        if len(self.found) <= SHOWN and not self.quiet and fault not in _TOLD:  # a source may be opened twice
            log.warning("left out: %s: %s", where, reason)
            _TOLD.add(fault)

    def attempt(self, where: str, make: Callable[..., Found], *arguments: Any) -> Found | None:
        """What `make(*arguments)` gives, or None where they are broken."""
        try:
            return make(*arguments)
        except BROKEN as error:
            self.report(where, _reason(error))
            return None

    def summary(self) -> str | None:
        """One line with the count, or None where nothing was wrong."""
        return f"{len(self.found)} faults, left out" if self.found else None


def sound(records: Iterable[tuple[str, Record]], faults: Faults) -> Iterator[Record]:
    """Of (where, record) those that are whole: captions that say something, spans inside their texts, ids unique."""
    seen: set[tuple[str, str]] = set()
    for where, record in records:
        if faults.attempt(where, _check, record) is None:
            continue
        if (record.source, record.id) in seen:
            faults.report(where, f"the id `{record.id}` was there before")
            continue
        seen.add((record.source, record.id))
        yield record


def _check(record: Record) -> bool:
    if not record.captions:
        raise ValueError("no caption")
    for name in (record.id, record.source):
        name.encode("utf-8")  # half a surrogate pair, or a tar member's name in another encoding
    texts = {
        "caption": record.captions,
        "negative": [negative.caption for negative in record.negatives],
        "expression": [expression.text for expression in record.expressions],
    }
    for what, some in texts.items():
        if not all(text.strip() for text in some):
            raise ValueError(f"an empty {what}")
    for expression in record.expressions:
        _check_spans(expression)
    return True


def _check_spans(expression: Expression) -> None:
    text, boxes, spans = expression.text, expression.boxes, expression.spans
    if not boxes or len(boxes) != len(spans):
        raise ValueError(f"{len(boxes)} boxes but {len(spans)} spans in expression {text!r}")
    for start, end in spans:
        if not (0 <= start < end <= len(text) and text[start:end].strip()):
            raise ValueError(f"span [{start}, {end}) names nothing in expression {text!r}")


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"key {error} is missing"
    return " ".join(str(error).split()) or type(error).__name__
