"""The native format: a folder of images with `metadata.jsonl`, which `datasets.load_dataset("imagefolder")` reads too.

A line: `file_name`, `captions` [], `expressions` [{text, spans, boxes}], `negatives` [{caption, rule}] and
`negative_file`; boxes xywh in pixels, spans [start, end) in characters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.errors import InputError

METADATA = "metadata.jsonl"


def read_imagefolder(folder: Path) -> list[Record]:
    """All records of a folder, in the order of its metadata. Images are opened when they are used.

    Raises:
        InputError: the metadata is missing or empty, a line is broken, or a file that it names is not there.
    """
    file = Path(folder) / METADATA
    if not file.is_file():
        raise InputError(f"{file} does not exist; `dpt scenes export` writes such a folder")
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            records.append(_record(Path(folder), line, f"{file}, line {number}"))
    if not records:
        raise InputError(f"{file} holds no record")
    return records


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The metadata's lines as they stand, one a record of `read_imagefolder`, whose errors they share."""
    read_imagefolder(folder)
    lines = (Path(folder) / METADATA).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the metadata in one move."""
    unfinished = Path(folder) / f"{METADATA}.partial"
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, Path(folder) / METADATA)


def _record(folder: Path, line: str, where: str) -> Record:
    try:
        row = json.loads(line)
        name, captions = row["file_name"], tuple(row["captions"])
        negative = row.get("negative_file")
        record = Record(
            id=name,
            source=folder.name,
            image=_existing(folder / name, where),
            captions=captions,
            expressions=tuple(_expression(entry) for entry in row.get("expressions") or ()),
            negatives=tuple(Negative(entry["caption"], entry["rule"]) for entry in row.get("negatives") or ()),
            negative_image=_existing(folder / negative, where) if negative else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is not a record: {type(error).__name__} {error}") from error
    if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
        raise InputError(f"{where} has no caption, or an empty one; remove the line or write one")
    return record


def _expression(entry: Mapping[str, Any]) -> Expression:
    boxes = tuple((float(x), float(y), float(w), float(h)) for x, y, w, h in entry["boxes"])
    spans = tuple((int(start), int(end)) for start, end in entry["spans"])
    if len(spans) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(spans)} spans in expression {entry['text']!r}")
    return Expression(entry["text"], spans, boxes)


def _existing(path: Path, where: str) -> Path:
    if not path.is_file():
        raise InputError(f"{where} names {path}, which does not exist")
    return path
