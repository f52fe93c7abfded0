"""The native format: a folder of images with `metadata.jsonl`, which `datasets.load_dataset("imagefolder")` reads too.

A line: `file_name`, `captions` [], `expressions` [{text, spans, boxes}], `negatives` [{caption, rule}] and
`negative_file`; boxes xywh in pixels, spans [start, end) in characters. `image_id` names the picture in COCO.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpt_t2i.data.faults import Faults, sound
from dpt_t2i.data.fields import existing, image_identity, listed, read_expression, read_lines, table, text
from dpt_t2i.data.records import ImageSource, Negative, Record
from dpt_t2i.errors import InputError
from dpt_t2i.files import write_text

METADATA = "metadata.jsonl"
KEYS = ("file_name", "captions", "caption", "text", "expressions", "negatives", "negative_file", "image_id")


def read_imagefolder(folder: Path, faults: Faults | None = None) -> list[Record]:
    """All records of a folder, in the order of its metadata; see `each_record`."""
    return list(each_record(folder, faults))


def each_record(folder: Path, faults: Faults | None = None) -> Iterator[Record]:
    """The records of a folder one after the other. Images are opened when they are used.

    Raises:
        InputError: the metadata is missing or empty, or, unless `faults` skips such records, a line is broken or a
            file that it names is not there.
    """
    file, faults = Path(folder) / METADATA, faults or Faults()
    if not file.is_file():
        raise InputError(f"{file} does not exist; {_mend(file.parent)}")
    empty = True
    for record in sound(_records(Path(folder), file, faults), faults):
        empty = False
        yield record
    if empty:
        found = faults.found[:1]
        why = [f": all lines were left out, the first because: {fault.reason}" for fault in found]
        raise InputError(f"{file} holds no record{''.join(why)}")


def _mend(folder: Path) -> str:
    """What to do about a folder without metadata."""
    if not folder.is_dir():
        return "give a folder that is there"
    if parts := [part.parent for part in sorted(folder.glob(f"*/{METADATA}"))]:
        return f"give {' or '.join(map(str, parts))}"
    how = "docs/data.md says how it is written"
    if (folder / "metadata.csv").is_file():
        return f"metadata.csv is not read: write its rows as JSON, one a line; {how}"
    texts = {path.stem for path in folder.glob("*.txt")}
    if any(path.stem in texts and path.suffix != ".txt" for path in folder.iterdir()):
        return f"of captions in a .txt file beside each picture make one line a picture; {how}"
    return how


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The metadata's lines, one a record of `read_imagefolder`, whose errors they share; each with its `captions`."""
    records = read_imagefolder(folder, Faults(advice="mend the line, or take it out: all are written again"))
    rows = (json.loads(line) for _, line in read_lines(Path(folder) / METADATA))
    return [row | {"captions": list(record.captions)} for row, record in zip(rows, records, strict=True)]


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the metadata in one move."""
    write_text(Path(folder) / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def misspelt_keys(folder: Path, split: str) -> Iterator[tuple[str, str, str]]:
    """(where, key, the key that is meant) of keys that nothing reads and that look like one of ours.

    Other keys are the user's own. Nothing of a folder that is no imagefolder.
    """
    file = next((at for at in (folder / split / METADATA, folder / METADATA) if at.is_file()), None)
    for number, line in read_lines(file) if file is not None else ():
        try:
            row = json.loads(line)
        except ValueError:  # told elsewhere
            continue
        for key in row if isinstance(row, dict) else ():
            if key not in KEYS and (near := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)):
                yield f"{file}, line {number}", key, near[0]


def native_record(row: Mapping[str, Any], source: str, identity: str, image: ImageSource, root: Path) -> Record:
    """A record of the native fields, whatever file they stood in; `captions` may be one text under `text` or `caption`.

    Raises:
        KeyError, ValueError: a field is missing or of another type.
    """
    captions = row.get("captions")
    if captions is None:
        captions = [row["caption"] if "caption" in row else row["text"]]
    negatives = (table(entry, "a negative") for entry in listed(row.get("negatives"), "negatives"))
    negative = row.get("negative_file")
    return Record(
        id=identity,
        source=source,
        image=image,
        captions=tuple(text(caption, "captions") for caption in listed(captions, "captions")),
        expressions=tuple(read_expression(entry) for entry in listed(row.get("expressions"), "expressions")),
        negatives=tuple(Negative(text(n["caption"], "caption"), text(n["rule"], "rule")) for n in negatives),
        negative_image=existing(root, text(negative, "negative_file")) if negative else None,
        image_id="" if row.get("image_id") is None else image_identity(row["image_id"]),
    )


def _records(folder: Path, file: Path, faults: Faults) -> Iterator[tuple[str, Record]]:
    for number, line in read_lines(file):
        where = f"{file}, line {number}"
        record = faults.attempt(where, _record, folder, line)
        if record is not None:
            yield where, record


def _record(folder: Path, line: bytes) -> Record:
    row = table(json.loads(line.decode("utf-8")))
    name = text(row["file_name"], "file_name")
    return native_record(row, folder.name, name, existing(folder, name), folder)
