"""The hard negatives of the authors' release: a TSV, or a folder with a JSON file a caption.

A row is one caption (`title`) of one picture (`filepath`) with the captions (`neg_caption`) and pictures (`neg_image`)
that were mined for it, both written as Python lists. In the folder, `00042.json` holds row 42 and `imgname2txtid.json`
the rows of each picture. One record a row.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpt_t2i.data.faults import Faults, sound
from dpt_t2i.data.fields import existing, listed, read_json, table, text, whole
from dpt_t2i.data.records import Negative, Record
from dpt_t2i.errors import InputError

COLUMNS = ("filepath", "title", "neg_caption", "neg_image")
INDEX = "imgname2txtid.json"
LONGEST = 1_000_000  # characters of a literal: Python's reader of literals is for sane ones


def read_release(path: Path, image_root: Path, faults: Faults | None = None) -> Iterator[Record]:
    """Records of a TSV file, or of a folder of JSON files, in the order of their rows.

    Raises:
        InputError: the file is missing or has other columns; or a broken record, unless `faults` skips such.
    """
    faults = faults or Faults()
    rows = _folder_rows(path, faults) if path.is_dir() else _tsv_rows(path)
    yield from sound(_records(rows, path.stem, image_root, faults), faults)


def _records(
    rows: Iterator[tuple[str, str, Mapping[str, Any]]], source: str, root: Path, faults: Faults
) -> Iterator[tuple[str, Record]]:
    for where, key, row in rows:
        record = faults.attempt(where, _record, row, key, source, root)
        if record is not None:
            yield where, record


def _record(row: Mapping[str, Any], key: str, source: str, root: Path) -> Record:
    name = text(row["filepath"], "filepath")
    negatives = tuple(Negative(caption, "mined") for caption in _texts(row["neg_caption"], "neg_caption"))
    images = [existing(root, file) for file in _texts(row["neg_image"], "neg_image")]
    return Record(
        id=key,
        source=source,
        image=existing(root, name),
        captions=(text(row["title"], "title"),),
        negatives=negatives,
        negative_image=images[0] if images else None,
        more_negative_images=tuple(images[1:]),
        paired=False,
    )


def _texts(value: Any, what: str) -> list[str]:
    """A list of texts, written as a Python literal or, in JSON, as it is."""
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"`{what}` is too long")
        try:
            value = ast.literal_eval(value) if value.strip() else []
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"`{what}` is no Python list: {str(value)[:80]!r}") from error
    return [text(entry, what) for entry in listed(value, what)]


def _tsv_rows(path: Path) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} lacks the columns {', '.join(missing)}; the release's has {', '.join(COLUMNS)}"
                )
            for number, row in enumerate(reader):
                # A row that is cut short lacks its last columns, which is not the same as empty ones.
                yield f"{path}, row {number}", str(number), {k: v for k, v in row.items() if v is not None}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except csv.Error as error:
        raise InputError(f"{path} is no TSV file: {error}") from error


def _folder_rows(folder: Path, faults: Faults) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    index = read_json(folder / INDEX)
    if not isinstance(index, dict):
        raise InputError(f"{folder / INDEX} must be an object: picture -> its rows")
    for name, entry in index.items():
        where = f"{folder / INDEX}, {name}"
        numbers = faults.attempt(where, _numbers, entry)
        for number in numbers or ():
            file = folder / f"{number:05d}.json"
            row = faults.attempt(where, _json_row, file, name)
            if row is not None:
                yield str(file), str(number), row


def _numbers(entry: Any) -> list[int]:
    return [whole(number, "a row's number") for number in listed(entry, "rows")]


def _json_row(file: Path, name: str) -> Mapping[str, Any]:
    return {"filepath": name} | dict(table(read_json(file)))
