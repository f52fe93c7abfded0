"""MDETR's JSON (Kamath et al., ICCV 2021): `finetune_refcoco_train.json` and kin, in COCO's layout.

An image row is one caption of one picture (`original_id`, in the Flickr30k file `original_img_id`), its annotations the
boxes that `tokens_positive` of the caption name. Read as one record a picture, each caption an expression. The mixed
file holds pictures of COCO and of Visual Genome, whose ids may be equal: a picture is its id and its file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpt_t2i.data.coco import CocoFile, Row, captions_of, image_file, image_size, open_coco
from dpt_t2i.data.faults import Faults, sound
from dpt_t2i.data.fields import identity, image_identity, listed, read_box, read_span, text
from dpt_t2i.data.records import Expression, Record, check_inside, coco_image_id
from dpt_t2i.errors import InputError

_Picture = tuple[str, str]  # id and file name


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
    """COCO's ids of all pictures of a file: those that a validation or test file keeps from training.

    Raises:
        InputError: the file, or the id of one of its images, cannot be read.
    """
    faults = Faults()
    found = {
        faults.attempt(f"{path}, image {key}", _coco_id, row) for key, row in open_coco(path, faults).images.items()
    }
    return {picture for picture in found if picture}


def _records(
    files: Sequence[CocoFile], captions: Mapping[str, Sequence[str]], root: Path, faults: Faults
) -> Iterator[tuple[str, Record]]:
    for file in files:
        things: dict[str, list[Row]] = defaultdict(list)
        for _, image, row in file.rows(faults):
            things[image].append(row)
        texts: dict[_Picture, list[str]] = defaultdict(list)
        expressions: dict[_Picture, list[Expression]] = defaultdict(list)
        sizes: dict[_Picture, tuple[int, int]] = {}
        first: dict[_Picture, Row] = {}
        for key, row in file.images.items():
            found = faults.attempt(f"{file.path}, image {key}", _read, row, things.get(key, ()))
            if found is not None:
                picture, caption, expression = found
                first.setdefault(picture, row)
                texts[picture].append(caption)
                expressions[picture].extend(expression)
                if expression:
                    sizes[picture] = image_size(row)
        shared = Counter(number for number, _ in first)
        for picture, row in first.items():
            number, name = picture
            where = f"{file.path}, original_id {number}"
            path = faults.attempt(where, image_file, row, root)
            if path is not None:
                in_coco, source = _coco_id(row), row.get("dataset_name")
                own = captions.get(in_coco) or dict.fromkeys(texts[picture])
                record = Record(
                    id=number if shared[number] == 1 else name,
                    source=source if isinstance(source, str) else file.path.stem,
                    image=path,
                    captions=tuple(own),
                    expressions=tuple(expressions[picture]),
                    image_id=in_coco,
                    boxes_of=sizes.get(picture),
                )
                yield where, record


def _read(row: Row, things: Sequence[Row]) -> tuple[_Picture, str, list[Expression]]:
    """Picture, caption, and the expression that it is, if it names boxes."""
    caption = text(row["caption"], "caption")
    if not caption.strip():
        raise ValueError("the caption is empty")
    boxes = tuple(read_box(thing["bbox"]) for thing in things)
    if boxes:
        check_inside(boxes, image_size(row))
    spans = tuple(_span(thing, caption) for thing in things)
    picture = _picture(row), text(row["file_name"], "file_name")
    return picture, caption, [Expression(caption, spans, boxes)] if boxes else []


def _span(thing: Row, caption: str) -> tuple[int, int]:
    spans = [read_span(span) for span in listed(thing.get("tokens_positive"), "tokens_positive")]
    if not spans:
        return 0, len(caption)
    start, end = min(start for start, _ in spans), max(end for _, end in spans)
    if not (0 <= start < end <= len(caption) and caption[start:end].strip()):
        raise ValueError(f"tokens_positive {spans} name nothing in {caption!r}")
    return start, end


def _picture(row: Mapping[str, Any]) -> str:
    key = next(name for name in ("original_id", "original_img_id", "id") if name in row)
    return identity(row[key], key)


def _coco_id(row: Mapping[str, Any]) -> str:
    """Of a picture of COCO; "" for one of Visual Genome or Flickr30k, whose ids are others."""
    told, named = _picture(row), coco_image_id(text(row["file_name"], "file_name"))
    return named or (image_identity(told) if row.get("data_source") == "coco" else "")
