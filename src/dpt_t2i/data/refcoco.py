"""RefCOCO, RefCOCO+ and RefCOCOg: `refs(unc).p`, `refs(umd).p`, `refs(google).p` beside `instances.json`.

(Yu et al., ECCV 2016; Mao et al., CVPR 2016.) The pictures are those of COCO train2014. One record an image, each
sentence an expression that names its box as a whole: the files hold no finer span.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpt_t2i.data.coco import CocoFile, captions_of, image_file, image_size, open_coco
from dpt_t2i.data.faults import Faults, sound
from dpt_t2i.data.fields import Box, identity, listed, read_box, table, text
from dpt_t2i.data.records import Expression, Record, check_inside
from dpt_t2i.data.unpickling import read_plain_pickle
from dpt_t2i.errors import InputError

HELD_OUT = ("val", "test", "testA", "testB")


def read_refcoco(files: Sequence[Path], image_root: Path, split: str, faults: Faults | None = None) -> Iterator[Record]:
    """Records of a split, in the order in which the refs come to their images.

    Args:
        files: one `refs(*).p`, its `instances.json`, and captions_*.json of COCO where the images' own captions are
            wanted; without them an image's sentences are its captions.
        image_root: folder of COCO's train2014 images.
        split: train, val, test, testA, testB.

    Raises:
        InputError: a file is missing or none of these, the split is empty; or a broken record, unless `faults` skips.
    """
    faults = faults or Faults()
    pickles = [path for path in files if path.suffix in (".p", ".pkl", ".pickle")]
    opened = [open_coco(path, faults) for path in files if path not in pickles]
    instances = [file for file in opened if not file.has_captions]
    if len(pickles) != 1 or len(instances) != 1:
        raise InputError(f"RefCOCO takes one refs(*).p and one instances.json, got {', '.join(map(str, files)) or '-'}")
    captions: dict[str, list[str]] = {}
    for file in opened:
        if file.has_captions:
            captions.update(captions_of(file, faults))
    refs = list(_rows(pickles[0], faults))
    wanted = [(where, row) for where, row in refs if row.get("split") == split]
    if not wanted:
        known = ", ".join(sorted({str(row.get("split")) for _, row in refs}))
        raise InputError(f"{pickles[0]} has no refs of split `{split}`; it has: {known[:200] or 'none'}")
    source = pickles[0].parent.name
    yield from sound(_records(wanted, instances[0], captions, image_root, source, faults), faults)


def held_out_images(path: Path) -> set[str]:
    """Image ids of the validation and test refs of a `refs(*).p`.

    Raises:
        InputError: it is missing or no such file.
    """
    faults = Faults()
    rows = (row for _, row in _rows(path, faults) if row.get("split") in HELD_OUT)
    return {identity(row.get("image_id"), "image_id") for row in rows}


def _rows(path: Path, faults: Faults) -> Iterator[tuple[str, Mapping[str, Any]]]:
    tree = read_plain_pickle(path)
    if not isinstance(tree, list):
        raise InputError(f"{path} holds no list of refs")
    for number, entry in enumerate(tree):
        row = faults.attempt(f"{path}, ref {number}", table, entry)
        if row is not None:
            yield f"{path}, ref {number}", row


def _records(
    refs: Sequence[tuple[str, Mapping[str, Any]]],
    instances: CocoFile,
    captions: Mapping[str, Sequence[str]],
    root: Path,
    source: str,
    faults: Faults,
) -> Iterator[tuple[str, Record]]:
    boxes = _annotations(instances, faults)
    found: dict[str, list[Expression]] = defaultdict(list)
    for where, row in refs:
        pair = faults.attempt(where, _expressions, row, instances, boxes)
        if pair is not None:
            found[pair[0]].extend(pair[1])
    for image, expressions in found.items():
        where = f"{instances.path}, image {image}"
        path = faults.attempt(where, image_file, instances.images[image], root)
        if path is not None:
            texts = tuple(captions.get(image) or dict.fromkeys(e.text for e in expressions))
            size = image_size(instances.images[image])
            yield where, Record(image, source, path, texts, tuple(expressions), image_id=image, boxes_of=size)


def _expressions(
    row: Mapping[str, Any], instances: CocoFile, boxes: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> tuple[str, list[Expression]]:
    """Image id of a ref, and its sentences."""
    image, annotation = identity(row["image_id"], "image_id"), identity(row["ann_id"], "ann_id")
    if annotation not in boxes or image not in instances.images:
        raise ValueError(f"annotation {annotation} of image {image} is not in {instances.path}")
    owner, thing = boxes[annotation]
    if owner != image:
        raise ValueError(f"annotation {annotation} belongs to image {owner}, not {image}")
    box: Box = read_box(thing["bbox"])
    check_inside([box], image_size(instances.images[image]))
    sentences = [text(table(s, "a sentence")["sent"], "sent") for s in listed(row["sentences"], "sentences")]
    if not sentences or not all(sentence.strip() for sentence in sentences):
        raise ValueError("a ref without a sentence, or with an empty one")
    return image, [Expression(sentence, ((0, len(sentence)),), (box,)) for sentence in sentences]


def _annotations(file: CocoFile, faults: Faults) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Image id and row by annotation id."""
    rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for where, image, row in file.rows(faults):
        key = faults.attempt(where, _annotation_id, row)
        if key in rows:
            faults.report(where, f"the id `{key}` was there before")
        elif key is not None:
            rows[key] = (image, row)
    return rows


def _annotation_id(row: Mapping[str, Any]) -> str:
    return identity(row["id"], "id")
