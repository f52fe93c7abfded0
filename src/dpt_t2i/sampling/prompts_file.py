"""Prompts from a file: a line each, or the tables and JSON lines in which benchmarks publish theirs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt_t2i.errors import InputError

TEXT_KEYS = ("prompt", "caption", "text")  # GenEval and PartiPrompts; COCO-NSS1K
CATEGORY_KEYS = ("category", "tag")  # PartiPrompts and COCO-NSS1K; GenEval


@dataclass(frozen=True)
class PromptLine:
    """A prompt, and what kind of prompt its file says that it is."""

    text: str
    category: str | None = None


def read_prompts_file(path: Path) -> list[PromptLine]:
    """The prompts in order; blank lines are none.

    `.jsonl`: `prompt` (or `caption`, `text`) and, where there is one, `category` or `tag`. `.tsv` and `.csv`: columns
    of these names in any case; a TSV has no quotes. Anything else: a prompt a line.

    Raises:
        InputError: file missing, not UTF-8, a line of JSON or a row without a prompt (names the line), or a table
            without a column of prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` cuts at characters that JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts file {path} cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        return [_of_row(path, number, _json(path, number, text)) for number, text in numbered]
    if path.suffix in (".tsv", ".csv"):
        return list(_of_table(path, lines))
    return [PromptLine(line.strip()) for line in lines if line.strip()]


def _json(path: Path, number: int, text: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise InputError(f"prompts file {path}, line {number}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"prompts file {path}, line {number}: no object with `prompt`")
    return row


def _of_table(path: Path, lines: list[str]) -> Iterator[PromptLine]:
    kept = [f"{line.rstrip(chr(13))}\n" for line in lines]
    quoting: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    table = csv.DictReader(kept, delimiter="\t" if path.suffix == ".tsv" else ",", **quoting)
    names = [str(name).strip().lower() for name in table.fieldnames or ()]
    if not set(names) & set(TEXT_KEYS):
        raise InputError(
            f"prompts file {path}: no column is called {', '.join(TEXT_KEYS)}; there are {', '.join(names)}"
        )
    table.fieldnames = names
    for row in table:
        if any(str(value or "").strip() for value in row.values()):
            yield _of_row(path, table.line_num, row)


def _of_row(path: Path, number: int, row: Mapping[str, Any]) -> PromptLine:
    text = next((row[key] for key in TEXT_KEYS if key in row), None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"prompts file {path}, line {number}: no text under `prompt`")
    category = next((row[key] for key in CATEGORY_KEYS if row.get(key)), None)
    return PromptLine(text.strip(), None if category is None else str(category))
