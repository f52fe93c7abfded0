"""Picture files as the RGB that everybody sees: upright, and of the brightness that they were stored with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dpt_t2i.errors import InputError

T = TypeVar("T")

_ORIENTATION = 0x0112  # EXIF
_LYING = (5, 6, 7, 8)  # its values that exchange width and height


# Told apart by eyes with any colour vision (Okabe and Ito); used in turn.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def printable(text: str) -> str:
    """As Pillow's built-in font can write it, which may know Latin letters only."""
    return text.encode("latin-1", "replace").decode("latin-1")


def as_rgb(image: Image.Image, upright: bool = True) -> Image.Image:
    """A picture in RGB; 16 bits a pixel are scaled to 8, transparency is dropped.

    Args:
        upright: turn it as its EXIF orientation says.

    Raises:
        ValueError: 32 bits a pixel, whose range nothing tells.
    """
    image = ImageOps.exif_transpose(image) if upright else image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a pixel (mode {image.mode}) have no known range, store it with 8 or 16")
    return image.convert("RGB")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that `as_rgb` gives, from the header alone."""
    width, height = image.size
    lies = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _LYING  # Pillow has turned a TIFF's already
    return (height, width) if lies else (width, height)


def read_picture(
    file: Path | IO[bytes],
    read: Callable[[Image.Image], T],
    name: str | None = None,
    mend: str = "replace or remove the file",
) -> T:
    """What `read` makes of an opened picture file.

    Args:
        name: of what has no path, for the error.

    Raises:
        InputError: the file is missing, broken, no picture, or too large to be opened safely.
    """
    name = str(file) if name is None else name
    try:
        with Image.open(file) as image:
            return read(image)
    except UnidentifiedImageError as error:  # whose own words may name an address in memory, another each time
        raise InputError(f"cannot read image {name}: cannot identify its format; {mend}") from error
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read image {name}: {error}; {mend}") from error
