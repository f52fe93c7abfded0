"""The one record type: what every reader gives and every stage takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dpt_t2i.errors import InputError

ImageSource = Path | Callable[[], Image.Image]


@dataclass(frozen=True)
class Expression:
    """A text that refers to something in the image, and where that is."""

    text: str
    spans: tuple[tuple[int, int], ...]  # character ranges [start, end) of `text` that name the boxes
    boxes: tuple[tuple[float, float, float, float], ...]  # xywh in pixels; several for "the two stars"


@dataclass(frozen=True)
class Negative:
    """A caption that is almost true of the image, and is not."""

    caption: str
    rule: str  # how it was made: a name of `perturb.RULES`, a scene's own (swap_colors, ...), or `mined`


@dataclass(frozen=True)
class Record:
    """One image with what is known of it."""

    id: str  # unique within `source`
    source: str  # `scenes`, or the name of the data set
    image: ImageSource  # a file, or a function that draws the picture (RGB)
    captions: tuple[str, ...]
    expressions: tuple[Expression, ...] = ()
    negatives: tuple[Negative, ...] = ()
    negative_image: ImageSource | None = None  # an image of which negatives[0].caption is true and captions[0] is not

    def load_image(self) -> Image.Image:
        """The image in RGB; raises `InputError` naming the file if it is missing or broken."""
        return _load(self.image)

    def load_negative_image(self) -> Image.Image | None:
        """The hard-negative image in RGB, or None where the record has none."""
        return None if self.negative_image is None else _load(self.negative_image)


def _load(source: ImageSource) -> Image.Image:
    if not isinstance(source, Path):
        return source()
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot read image {source}: {error}; replace or remove the file") from error
