"""MDETR's JSON (Kamath et al., ICCV 2021): `finetune_refcoco_train.json` and kin, in COCO's layout.

An image row is one caption of one picture (`original_id`), its annotations the boxes that `tokens_positive` of the
caption name. Read as one record a picture, each caption an expression.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpt_t2i.data.coco import CocoFile, Row, captions_of, image_file, image_size, open_coco
from dpt_t2i.data.faults import Faults, sound
from dpt_t2i.data.fields import identity, listed, read_box, read_span, text
from dpt_t2i.data.records import Expression, Record, check_inside
from dpt_t2i.errors import InputError


def read_mdetr(files: Sequence[Path], image_root: Path, faults: Faults | None = None) -> Iterator[Record]:
    """Records of the pictures, in the order in which they come.

    Several spans of one box become the one that reaches over them all. A caption without a box is a caption only.

    Args:
        files: MDETR's files, and captions_*.json of COCO where the pictures' own captions are wanted; without them
            the captions of a picture's expressions are its captions.
        image_root: folder of the images.

    Raises:
        InputError: a file is missing or none of these; or a broken record, unless `faults` skips such.
    """
    faults = faults or Faults()
    opened = [open_coco(path, faults) for path in files]
    own = [file for file in opened if any("caption" in row for row in file.images.values() if isinstance(row, dict))]
    if not own:
        raise InputError(f"no image of {', '.join(map(str, files)) or '-'} has a `caption`, as MDETR's files have")
    captions: dict[str, list[str]] = {}
    for file in opened:
        if file not in own:
            captions.update(captions_of(file, faults))
    yield from sound(_records(own, captions, image_root, faults), faults)


def pictures_of(path: Path) -> set[str]:
    """`original_id` of all pictures of a file: those that a validation or test file keeps from training.

    Raises:
        InputError: the file, or the id of one of its images, cannot be read.
    """
    faults = Faults()
    found = {
        faults.attempt(f"{path}, image {key}", _picture, row) for key, row in open_coco(path, faults).images.items()
    }
    return {picture for picture in found if picture is not None}


def _records(
    files: Sequence[CocoFile], captions: Mapping[str, Sequence[str]], root: Path, faults: Faults
) -> Iterator[tuple[str, Record]]:
    for file in files:
        things: dict[str, list[Row]] = defaultdict(list)
        for _, image, row in file.rows(faults):
            things[image].append(row)
        texts: dict[str, list[str]] = defaultdict(list)
        expressions: dict[str, list[Expression]] = defaultdict(list)
        first: dict[str, Row] = {}
        for key, row in file.images.items():
            found = faults.attempt(f"{file.path}, image {key}", _read, row, things.get(key, ()))
            if found is not None:
                picture, caption, expression = found
                first.setdefault(picture, row)
                texts[picture].append(caption)
                expressions[picture].extend(expression)
        for picture, row in first.items():
            where = f"{file.path}, original_id {picture}"
            path = faults.attempt(where, image_file, row, root)
            if path is not None:
                own = tuple(captions.get(picture) or dict.fromkeys(texts[picture]))
                source = row.get("dataset_name")
                yield (
                    where,
                    Record(
                        id=picture,
                        source=source if isinstance(source, str) else file.path.stem,
                        image=path,
                        captions=own,
                        expressions=tuple(expressions[picture]),
                        image_id=picture,
                    ),
                )


def _read(row: Row, things: Sequence[Row]) -> tuple[str, str, list[Expression]]:
    """Picture, caption, and the expression that it is, if it names boxes."""
    caption = text(row["caption"], "caption")
    if not caption.strip():
        raise ValueError("the caption is empty")
    boxes = tuple(read_box(thing["bbox"]) for thing in things)
    check_inside(boxes, image_size(row))
    spans = tuple(_span(thing, caption) for thing in things)
    return _picture(row), caption, [Expression(caption, spans, boxes)] if boxes else []


def _span(thing: Row, caption: str) -> tuple[int, int]:
    spans = [read_span(span) for span in listed(thing.get("tokens_positive"), "tokens_positive")]
    if not spans:
        return 0, len(caption)
    start, end = min(start for start, _ in spans), max(end for _, end in spans)
    if not (0 <= start < end <= len(caption) and caption[start:end].strip()):
        raise ValueError(f"tokens_positive {spans} name nothing in {caption!r}")
    return start, end


def _picture(row: Mapping[str, Any]) -> str:
    return identity(row["original_id"] if "original_id" in row else row["id"], "original_id")
