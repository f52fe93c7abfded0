"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@contextmanager
def in_one_move(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; the file takes its name as the block ends. Folders are made as needed.

    A kill leaves what was there before; so does an error, which takes the unfinished file away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write one file
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_picture(image: Image, path: Path) -> None:
    """A picture in one move, in the format of its name. Raises `ValueError` where that format has no room for it."""
    from PIL.Image import registered_extensions

    with in_one_move(path) as unfinished:
        image.save(unfinished, format=registered_extensions()[path.suffix.lower()])


def file_hash(path: Path) -> str:
    """16 hex digits of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def keep_copy(path: Path) -> Path:
    """A copy beside `path` that nothing replaces: `metrics.before.jsonl`, the next time `metrics.before-2.jsonl`."""
    names = (f"{path.stem}.before{'' if count == 1 else f'-{count}'}{path.suffix}" for count in itertools.count(1))
    kept = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    with in_one_move(kept) as unfinished:
        shutil.copyfile(path, unfinished)
    return kept


def write_text(path: Path, text: str) -> None:
    """UTF-8, in one move."""
    with in_one_move(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
