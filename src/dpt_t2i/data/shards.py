"""WebDataset: tar shards whose members of one stem are one sample: `.jpg` or `.png`, `.txt` or `.json`.

`.txt` is a caption, `.json` holds the native fields (`captions`, `expressions`, `negatives`), and `.negative.png` is
the hard-negative image. Shards on disk are indexed once and read at random, so that what is seen never depends on
ranks or workers; a stream is read in order, its shards dealt out.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from itertools import groupby
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse
from urllib.request import urlopen

from PIL import Image

from dpt_t2i.data.faults import Faults, sound
from dpt_t2i.data.fields import table
from dpt_t2i.data.imagefolder import native_record
from dpt_t2i.data.records import ImageSource, Record, file_stamp
from dpt_t2i.errors import InputError
from dpt_t2i.pictures import as_rgb, read_picture

IMAGES = ("jpg", "jpeg", "png", "webp")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # {000..127} of a shard's name
DAMAGED = (tarfile.TarError, OSError, HTTPException, EOFError, ValueError, KeyError, IndexError, OverflowError)


class WholeTarInfo(tarfile.TarInfo):
    """A header of an archive that must be whole: `tarfile` takes a damaged or a missing one for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> WholeTarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the true end
                raise
            raise tarfile.ReadError(f"no header of a member and no end of the archive: {error}") from error


@dataclass(frozen=True, slots=True)
class TarImage:
    """A picture inside a shard on disk."""

    shard: str
    offset: int  # of its bytes
    size: int
    name: str

    def __call__(self) -> Image.Image:
        return decode(self.read(), f"{self.shard}: {self.name}")

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def stamp(self) -> tuple[object, ...]:
        """See `file_stamp`."""
        return (*file_stamp(Path(self.shard)), self.offset)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture as the bytes of its file."""

    data: bytes
    name: str
    shard: str = ""  # of a stream, whose member it is

    def __call__(self) -> Image.Image:
        return decode(self.data, f"{self.shard}: {self.name}" if self.shard else self.name)

    def read(self) -> bytes:
        return self.data

    def stamp(self) -> tuple[object, ...]:
        """Of the content itself."""
        return (hashlib.sha256(self.data).hexdigest(),)


def decode(data: bytes, name: str) -> Image.Image:
    """Bytes of a picture file -> RGB; raises `InputError` naming it."""
    return read_picture(io.BytesIO(data), as_rgb, name, "replace or remove it")


def read_shards(shards: Sequence[Path], faults: Faults | None = None) -> Iterator[Record]:
    """Records of shards on disk, whose pictures are read when they are used.

    Raises:
        InputError: there is no shard, or, unless `faults` skips such, one is cut or a sample is broken.
    """
    faults = faults or Faults()
    if not shards:
        raise InputError("no tar shard found; name them, or a folder that holds .tar files")
    labels = _labels([str(shard) for shard in shards])
    found = (p for shard, label in zip(shards, labels, strict=True) for p in _samples(label, shard, faults))
    yield from sound(found, faults)


def stream_shards(
    shards: Sequence[str],
    rank: int = 0,
    world: int = 1,
    worker: int = 0,
    workers: int = 1,
    faults: Faults | None = None,
) -> Iterator[Record]:
    """Records of this worker's shards (every shard belongs to one), read once from front to back.

    Args:
        shards: files, or http(s) addresses.
    """
    faults = faults or Faults()
    labelled = list(zip(shards, _labels(shards), strict=True))
    for shard, label in labelled[rank * workers + worker :: world * workers]:
        yield from sound(_samples(label, shard, faults), faults)


def _labels(shards: Sequence[str]) -> list[str]:
    """What the records of each shard are called after: its name, and its folder where two have one name."""
    paths = [Path(urlparse(shard).path).with_suffix("") for shard in shards]
    named = Counter(path.name for path in paths)
    return [path.name if named[path.name] == 1 else str(path) for path in paths]


def shard_names(pattern: str) -> list[str]:
    """`train-{000..002}.tar` -> train-000.tar, train-001.tar, train-002.tar; several ranges give every combination."""
    match = RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    width = len(match[1]) if match[1].startswith("0") else 0
    heads = (f"{pattern[: match.start()]}{number:0{width}d}" for number in range(first, last + 1))
    return [head + tail for head in heads for tail in shard_names(pattern[match.end() :])]


def _indexed(shard: Path, faults: Faults) -> Iterator[TarImage]:
    """Every file of a shard; ends with a fault where the shard is cut."""
    try:
        with tarfile.open(shard, "r:", tarinfo=WholeTarInfo) as tar:
            for member in tar:
                if member.isfile() and member.size >= 0:
                    yield TarImage(str(shard), member.offset_data, member.size, member.name)
    except DAMAGED as error:
        faults.report(str(shard), f"no whole uncompressed tar: {error}")


def _streamed(shard: str, faults: Faults) -> Iterator[EncodedImage]:
    try:
        with _open(shard) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=WholeTarInfo) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield EncodedImage(file.read(), member.name, shard)
    except DAMAGED as error:
        faults.report(shard, f"no whole tar: {error}")


def is_address(shard: str) -> bool:
    """Whether a shard is read over the network."""
    return urlparse(shard).scheme in ("http", "https")


def _open(shard: str) -> IO[bytes]:
    if is_address(shard):
        stream: IO[bytes] = urlopen(shard, timeout=60)
        return stream
    return open(shard, "rb")


def _samples(source: str, shard: Path | str, faults: Faults) -> Iterator[tuple[str, Record]]:
    members = _indexed(shard, faults) if isinstance(shard, Path) else _streamed(shard, faults)
    for key, group in groupby(members, key=_stem):
        where = f"{shard}, sample {key}"
        parts = {_split(member.name)[1]: member for member in group}
        record = faults.attempt(where, _record, key, source, parts)
        if record is not None:
            yield where, record


def _record(key: str, source: str, parts: Mapping[str, TarImage | EncodedImage]) -> Record:
    row: dict[str, Any] = {}
    if "json" in parts:
        row = dict(table(json.loads(parts["json"].read().decode("utf-8"))))
        row.pop("negative_file", None)  # its file is a member here
    if not any(name in row for name in ("captions", "caption", "text")):
        if "txt" not in parts:
            raise ValueError("no .txt, and no caption in .json")
        row["captions"] = [parts["txt"].read().decode("utf-8").strip()]
    image, negative = _picture(parts, ""), _picture(parts, "negative.")
    if image is None:
        raise ValueError(f"no picture: it needs a member that ends with one of {', '.join(IMAGES)}")
    record = native_record(row, source, key, image, Path())
    return record if negative is None else replace(record, negative_image=negative)


def _picture(parts: Mapping[str, ImageSource], prefix: str) -> ImageSource | None:
    return next((parts[prefix + suffix] for suffix in IMAGES if prefix + suffix in parts), None)


def _stem(member: TarImage | EncodedImage) -> str:
    return _split(member.name)[0]


def _split(name: str) -> tuple[str, str]:
    """`a/0001.negative.png` -> `a/0001`, `negative.png`."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()
