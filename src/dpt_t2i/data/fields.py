"""Reading foreign files: text, JSON and their fields, each with a type or a complaint that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpt_t2i.data.records import Expression
from dpt_t2i.errors import InputError

Box = tuple[float, float, float, float]


def read_json(path: Path, drop: str | None = None) -> Any:
    """A whole JSON file; `drop` = a key whose values are thrown away as they are read (COCO's polygons).

    Raises:
        InputError: the file is missing, no UTF-8, cut, or no JSON.
    """
    hook = None if drop is None else _without(drop)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_hook=hook)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {_short(error)}; it must be a whole JSON file in UTF-8") from error


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number from 1 and bytes of each line that is not empty; a line that is no UTF-8 is its record's fault alone.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def table(value: Any, what: str = "the record") -> Mapping[str, Any]:
    """A JSON object, or ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object, not {_kind(value)}")
    return value


def listed(value: Any, what: str) -> list[Any]:
    """A list, [] for null, or ValueError."""
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{what}` must be a list, not {_kind(value)}")
    return list(value)


def text(value: Any, what: str) -> str:
    """A text that can be written as UTF-8, or ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"`{what}` must be a text, not {_kind(value)}")
    if not value.isascii():
        value.encode("utf-8")  # half a surrogate pair raises here, not in a tokenizer
    return value


def whole(value: Any, what: str) -> int:
    """A whole number, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{what}` must be a whole number, not {_kind(value)}")
    return value


def identity(value: Any, what: str) -> str:
    """An id: a number or a text, as text."""
    return text(value, what) if isinstance(value, str) else str(whole(value, what))


def image_identity(value: Any) -> str:
    """The id of an image in COCO, without the zeros of a file's name; or ValueError."""
    told = identity(value, "image_id")
    return str(int(told)) if told.isascii() and told.isdigit() else told


def read_box(value: Any) -> Box:
    """xywh in pixels: four finite numbers, of which the last two are above 0; or ValueError."""
    numbers = listed(value, "bbox")
    if len(numbers) != 4 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise ValueError(f"a box must be four numbers x, y, width, height, not {str(value)[:80]}")
    x, y, w, h = (float(number) for number in numbers)
    if not all(map(math.isfinite, (x, y, w, h))):
        raise ValueError(f"a box must be finite, not {numbers}")
    if w <= 0 or h <= 0:
        raise ValueError(f"a box without area: {numbers}")
    return (x, y, w, h)


def read_span(value: Any) -> tuple[int, int]:
    """[start, end) in characters, or ValueError."""
    numbers = listed(value, "span")
    if len(numbers) != 2:
        raise ValueError(f"a span must be start and end, not {str(value)[:80]}")
    return whole(numbers[0], "span"), whole(numbers[1], "span")


def read_expression(value: Any) -> Expression:
    """Of the native form `{text, spans, boxes}`, or ValueError."""
    entry = table(value, "an expression")
    return Expression(
        text(entry["text"], "text"),
        tuple(read_span(span) for span in listed(entry["spans"], "spans")),
        tuple(read_box(box) for box in listed(entry["boxes"], "boxes")),
    )


def existing(root: Path, name: str) -> Path:
    """A file below `root`, or ValueError."""
    path = root / name
    try:
        found = path.is_file()
    except OSError as error:  # a name too long for the file system
        raise ValueError(f"{path}: {error.strerror}") from error
    if not found:
        shown = str(path) if str(path).isprintable() else ascii(str(path))
        raise ValueError(f"{shown} does not exist")
    return path


def _without(key: str) -> Any:
    def drop(row: dict[str, Any]) -> dict[str, Any]:
        row.pop(key, None)
        return row

    return drop


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
