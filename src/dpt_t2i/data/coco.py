"""COCO: `captions_*.json` and `instances_*.json` (Lin et al., ECCV 2014), read as the JSON that they are.

One record an image: all its captions. Instances have boxes but no expressions, so a category that occurs once in an
image is named "the {category}"; what occurs twice, or as a crowd, is no target of grounding.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt_t2i.data.faults import Faults, sound
from dpt_t2i.data.fields import existing, identity, image_identity, read_box, read_json, table, text, whole
from dpt_t2i.data.records import Expression, Record, check_inside
from dpt_t2i.errors import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class CocoFile:
    """One annotation file."""

    path: Path
    images: Mapping[str, Row]  # by id
    annotations: Sequence[Any]  # not looked at yet
    categories: Mapping[str, str]  # id -> name

    @property
    def has_captions(self) -> bool:
        return any(isinstance(row, Mapping) and "caption" in row for row in self.annotations)

    def rows(self, faults: Faults) -> Iterator[tuple[str, str, Row]]:
        """Where it stands, image id and row of each annotation that names an image of the file."""
        for number, entry in enumerate(self.annotations):
            where = f"{self.path}, annotations[{number}]"
            key = faults.attempt(where, self._image_of, entry)
            if key is not None:
                yield where, key, entry

    def _image_of(self, entry: Any) -> str:
        key = identity(table(entry)["image_id"], "image_id")
        if key not in self.images:
            raise ValueError(f"image {key} is not in the file")
        return key


def read_coco(files: Sequence[Path], image_root: Path, faults: Faults | None = None) -> Iterator[Record]:
    """Records of the images that the caption files list, in their order.

    Args:
        files: caption and instance files in any order; which is which is read from them.
        image_root: folder of the images.

    Raises:
        InputError: a file is no COCO file, none has captions; or a broken record, unless `faults` skips such.
    """
    faults = faults or Faults()
    opened = [open_coco(path, faults) for path in files]
    with_captions = [file for file in opened if file.has_captions]
    if not with_captions:
        names = ", ".join(map(str, files)) or "no file"
        raise InputError(f"COCO: no captions in {names}; give captions_*.json, beside it instances_*.json for boxes")
    expressions: dict[str, list[Expression]] = defaultdict(list)
    sizes: dict[str, tuple[int, int]] = {}
    for file in opened:
        if not file.has_captions:
            for image, found in _unique_things(file, faults):
                expressions[image].append(found)
                sizes[image] = image_size(file.images[image])
    yield from sound(_records(with_captions, expressions, sizes, image_root, faults), faults)


def captions_of(file: CocoFile, faults: Faults) -> dict[str, list[str]]:
    """Captions by image id."""
    captions: dict[str, list[str]] = defaultdict(list)
    for where, image, row in file.rows(faults):
        found = faults.attempt(where, _caption, row)
        if found is not None:
            captions[image].append(found)
    return captions


def open_coco(path: Path, faults: Faults) -> CocoFile:
    """Read a file of COCO's layout.

    Raises:
        InputError: it is no such file.
    """
    tree = read_json(path, drop="segmentation")
    lists = [tree.get(name, []) for name in ("images", "annotations", "categories")] if isinstance(tree, dict) else []
    if not lists or not lists[0] or not all(isinstance(entries, list) for entries in lists):
        raise InputError(f"{path} is no COCO file: it must be an object with lists `images` and `annotations`")
    images: dict[str, Row] = {}
    for number, entry in enumerate(lists[0]):
        where = f"{path}, images[{number}]"
        key = faults.attempt(where, _key, entry)
        if key in images:
            faults.report(where, f"the id `{key}` was there before")
        elif key is not None:
            images[key] = entry
    categories = {}
    for number, entry in enumerate(lists[2]):
        pair = faults.attempt(f"{path}, categories[{number}]", _named, entry)
        if pair is not None:
            categories[pair[0]] = pair[1]
    return CocoFile(path, images, lists[1], categories)


def image_size(row: Row) -> tuple[int, int]:
    """Width and height of an image's row, or ValueError. In MDETR's Flickr30k they are written as text."""
    width, height = (
        int(side) if isinstance(side, str) and side.isascii() and side.isdigit() else side
        for side in (row["width"], row["height"])
    )
    return whole(width, "width"), whole(height, "height")


def image_file(row: Row, root: Path) -> Path:
    """The file of an image's row, or ValueError."""
    return existing(root, text(row["file_name"], "file_name"))


def _records(
    files: Sequence[CocoFile],
    expressions: Mapping[str, Sequence[Expression]],
    sizes: Mapping[str, tuple[int, int]],
    root: Path,
    faults: Faults,
) -> Iterator[tuple[str, Record]]:
    for file in files:
        captions = captions_of(file, faults)
        for key, row in file.images.items():
            where = f"{file.path}, image {key}"
            path = faults.attempt(where, image_file, row, root)
            if path is not None:
                texts, things = tuple(captions.get(key, ())), tuple(expressions.get(key, ()))
                told, size = image_identity(key), sizes.get(key)
                yield where, Record(key, "coco", path, texts, things, image_id=told, boxes_of=size)


def _unique_things(file: CocoFile, faults: Faults) -> Iterator[tuple[str, Expression]]:
    """Image id and expression for each category that an image shows once."""
    counts: Counter[tuple[str, str]] = Counter()
    for where, image, row in file.rows(faults):
        category = faults.attempt(where, _category, row, file)
        if category is not None:
            counts[image, category] += 2 if row.get("iscrowd") else 1  # a crowd is more than one
    for where, image, row in file.rows(faults):
        category = file.categories.get(str(row.get("category_id")))
        if category is not None and counts[image, category] == 1:
            found = faults.attempt(where, _thing, row, category, file.images[image])
            if found is not None:
                yield image, found


def _thing(row: Row, category: str, image: Row) -> Expression:
    box = read_box(row["bbox"])
    check_inside([box], image_size(image))
    return Expression(f"the {category}", ((4, 4 + len(category)),), (box,))


def _category(row: Row, file: CocoFile) -> str:
    key = identity(row["category_id"], "category_id")
    if key not in file.categories:
        raise ValueError(f"category {key} is not in the file")
    return file.categories[key]


def _caption(row: Row) -> str:
    caption = text(row["caption"], "caption")
    if not caption.strip():
        raise ValueError("the caption is empty")
    return caption


def _key(entry: Any) -> str:
    return identity(table(entry)["id"], "id")


def _named(entry: Any) -> tuple[str, str]:
    name = text(table(entry)["name"], "name")
    if not name.strip():
        raise ValueError("the category has no name")
    return identity(entry["id"], "id"), name
