"""The one record type: what every reader gives and every stage takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dpt_t2i.errors import InputError
from dpt_t2i.pictures import as_rgb, read_picture, upright_size

ImageSource = Path | Callable[[], Image.Image]

COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})(?:_\d+)?\.\w+")
SLACK = 1.0  # pixels that a box may stick out of its image: annotators' rounding


@dataclass(frozen=True, slots=True)
class Expression:
    """A text that refers to something in the image, and where that is."""

    text: str
    spans: tuple[tuple[int, int], ...]  # character ranges [start, end) of `text` that name the boxes
    boxes: tuple[tuple[float, float, float, float], ...]  # xywh in pixels; several for "the two crosses"


@dataclass(frozen=True, slots=True)
class Negative:
    """A caption that is almost true of the image, and is not."""

    caption: str
    rule: str  # how it was made: a name of `perturb.RULES`, a scene's own (swap_colors, ...), or `mined`


@dataclass(frozen=True, slots=True)
class Record:
    """One image with what is known of it."""

    id: str  # unique within `source`
    source: str  # `scenes`, or the name of the data set
    image: ImageSource  # a file, or a function that draws the picture (RGB)
    captions: tuple[str, ...]
    expressions: tuple[Expression, ...] = ()
    negatives: tuple[Negative, ...] = ()
    negative_image: ImageSource | None = None  # an image of which negatives[0].caption is true and captions[0] is not
    image_id: str = ""  # of the picture in COCO, where it comes from there: several records and data sets share it
    more_negative_images: tuple[ImageSource, ...] = ()  # mined ones; then no caption belongs to any of them
    paired: bool = True  # False: negatives[0].caption need not be true of negative_image either
    boxes_of: tuple[int, int] | None = None  # width, height of the image that the boxes were drawn in, where told
    also_true: Callable[[Record], bool] | None = None  # of another record's picture, captions[0]; None = not known

    def load_image(self) -> Image.Image:
        """The image in RGB; raises `InputError` naming the file if it is missing or broken."""
        return load_picture(self.image)

    def image_size(self) -> tuple[int, int]:
        """Width and height in pixels, of a file by its header alone; errors as in `load_image`."""
        return read_picture(self.image, upright_size) if isinstance(self.image, Path) else self.image().size

    def load_negative_image(self, number: int = 0) -> Image.Image | None:
        """A hard-negative image in RGB (0 = `negative_image`), or None where the record has none."""
        if self.negative_image is None:
            return None
        return load_picture((self.negative_image, *self.more_negative_images)[number])

    def require_inside(self, boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> None:
        """Refuse boxes that do not fit the opened image of `size`; raises `InputError` naming the record."""
        try:
            self.check_boxes(boxes, size)
        except ValueError as error:
            raise InputError(f"{self.source}/{self.id}: {error}; mend it, or use on_bad: skip") from error

    def check_boxes(self, boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> None:
        """Refuse boxes that leave an image of `size`, or were drawn in one of another size; raises `ValueError`."""
        if boxes and self.boxes_of not in (None, size):
            told = "{} x {}".format(*self.boxes_of)
            raise ValueError(
                f"its boxes were drawn in an image of {told} pixels, and the file has {size[0]} x {size[1]} (upright); "
                "give the original file"
            )
        check_inside(boxes, size)

    @property
    def has_pair(self) -> bool:
        """Whether `negatives[0]` is true of `negative_image`."""
        return bool(self.paired and self.negatives and self.negative_image and not self.more_negative_images)

    @property
    def picture(self) -> str:
        """Which picture it shows: equal in two records of the same image."""
        if self.image_id:
            return self.image_id
        return str(self.image) if isinstance(self.image, Path) else f"{self.source}/{self.id}"  # an id is its shard's

    @property
    def coco_id(self) -> str:
        """Id of the picture in COCO: as told, else as the file's name looks; "" where neither tells."""
        return self.image_id or coco_image_id(self.image.name if isinstance(self.image, Path) else self.id)


def file_stamp(file: Path) -> tuple[str, int, int]:
    """What stands for a file's content without reading it: its place, size and time of change."""
    seen = file.stat()
    return str(file.resolve()), seen.st_size, seen.st_mtime_ns


def coco_image_id(name: str) -> str:
    """`9` of `COCO_train2014_000000000009.jpg` and of `000000000009.jpg`; "" for the names of others."""
    match = COCO_NAME.fullmatch(name.rpartition("/")[2])
    return str(int(match[1])) if match else ""


def check_inside(boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]) -> None:
    """Refuse boxes (xywh in pixels) that leave an image of `size` (width, height) by more than a pixel, or of which
    nothing lies inside.

    Raises:
        ValueError: names the box and the image's size.
    """
    for x, y, w, h in boxes:
        leaves = x < -SLACK or y < -SLACK or x + w > size[0] + SLACK or y + h > size[1] + SLACK
        if leaves or x >= size[0] or y >= size[1] or x + w <= 0 or y + h <= 0:
            raise ValueError(
                f"box {[x, y, w, h]} lies outside the image of {size[0]} x {size[1]} pixels (boxes are x, y, width, "
                "height in pixels)"
            )


def load_picture(source: ImageSource) -> Image.Image:
    """The picture in RGB; raises `InputError` naming a missing or broken file."""
    return read_picture(source, as_rgb) if isinstance(source, Path) else source()
