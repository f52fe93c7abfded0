"""Prompts from a file: a line each, or the tables and JSON lines in which benchmarks publish theirs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt_t2i.errors import InputError

TEXT_KEYS = ("prompt", "caption", "text")
CATEGORY_KEYS = ("category", "tag")  # PartiPrompts; GenEval


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
        InputError: file missing, not UTF-8, a `.json`; a line of JSON or a row without a prompt, a row of a table with
            more cells than columns (names the line); a table without a column of prompts, or with two of one name.
    """
    kind = path.suffix.lower()
    if kind == ".json":
        raise InputError(
            f"prompts file {path}: write it as .jsonl (an object with `prompt` a line), .tsv, .csv or .txt"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` cuts at characters that JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts file {path} cannot be read: {error}") from error
    if kind == ".jsonl":
        numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        return [_of_row(path, number, _json(path, number, text)) for number, text in numbered]
    if kind in (".tsv", ".csv"):
        return list(_of_table(path, lines, tabs=kind == ".tsv"))
    return [PromptLine(line.strip()) for line in lines if line.strip()]


def _json(path: Path, number: int, text: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise InputError(f"prompts file {path}, line {number}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"prompts file {path}, line {number}: no object with `prompt`")
    return row


def _of_table(path: Path, lines: list[str], tabs: bool) -> Iterator[PromptLine]:
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    table = csv.reader((f"{line.rstrip(chr(13))}\n" for line in lines), **how)
    try:
        names = [name.strip().lower() for name in next(table, [])]
        if not set(names) & set(TEXT_KEYS):
            there = ", ".join(names) or "none"
            raise InputError(f"prompts file {path}: no column is called {', '.join(TEXT_KEYS)}; there are {there}")
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise InputError(f"prompts file {path}: two columns are called {twice[0]}")
        for cells in table:
            if len(cells) > len(names):
                raise InputError(
                    f"prompts file {path}, line {table.line_num}: {len(cells)} cells in {len(names)} columns; in a "
                    ".csv a text with a comma goes into quotes"
                )
            if any(cell.strip() for cell in cells):
                yield _of_row(path, table.line_num, dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise InputError(f"prompts file {path}, line {table.line_num}: {error}") from error


def _of_row(path: Path, number: int, row: Mapping[str, Any]) -> PromptLine:
    text = next((row[key] for key in TEXT_KEYS if key in row), None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"prompts file {path}, line {number}: no text under `prompt`")
    told = (str(row[key]).strip() for key in CATEGORY_KEYS if row.get(key) is not None)
    return PromptLine(text.strip(), next(filter(None, told), None))
