"""Frozen encoders' outputs on disk, filled by any number of processes and read by content, never by place.

    <root>/<kind>-<digest of the spec>/spec.json            what was computed: model, weights, size, dtype
                                       <block>.safetensors  rows of one block of work, and the key of each row
                                       <block>.claim.<n>    who is at it

A row's key is a hash of what went into the encoder, and the folder's name is a hash of everything else that decides the
row. So what does not fit is not found, and is computed again. A shard appears by a rename when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpt_t2i.data.records import ImageSource, Record, file_stamp
from dpt_t2i.errors import InputError

log = logging.getLogger(__name__)

KEYS = "keys"  # column of each shard: [n, 16] uint8
STALE_AFTER = 300.0  # seconds without a sign of life from a process of another host
POLL = 0.5  # seconds between looks at what others are still at

Key = bytes  # 16
Columns = Mapping[str, Tensor]  # name -> [n, ...], a row each


@dataclass(frozen=True)
class Spec:
    """All that decides a row beside its content."""

    kind: str  # `latents`, `text`, ...
    model: str  # name of the base, for people
    weights: str  # hash of all that computes a row
    size: int  # pixels of the square, or tokens of a text
    compute_dtype: str  # of the encoder's weights
    dtype: str  # of the rows on disk
    version: int = 1  # of the code that computes them: a change of it that changes rows takes the next number

    @property
    def folder(self) -> str:
        decisive = {key: value for key, value in asdict(self).items() if key != "model"}  # a moved base is the same
        return f"{self.kind}-{_digest(json.dumps(decisive, sort_keys=True).encode()).hex()}"


class Cache:
    """Rows of one spec. What other processes add is seen after `refresh`."""

    def __init__(self, root: Path, spec: Spec) -> None:
        self.folder, self.spec = Path(root) / spec.folder, spec
        self._rows: dict[Key, tuple[str, int]] = {}  # key -> shard, row
        self._shards: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def elsewhere(self) -> list[str]:
        """Where this cache holds nothing: what other caches of its kind in the same root differ in, one line each."""
        lines, kind = [], self.spec.kind
        for file in sorted(self.folder.parent.glob(f"{kind}-*/spec.json")) if not len(self) else ():
            with suppress(OSError, ValueError):
                theirs = json.loads(file.read_text(encoding="utf-8"))
                ours = asdict(self.spec)
                differing = [key for key in ours if key != "model" and theirs.get(key) != ours[key]]
                told = (f"{key} {theirs.get(key)}, not {getattr(self.spec, key)}" for key in differing)
                lines.append("; ".join(told))
        return lines

    def refresh(self) -> None:
        """Learn what is in shards that are new. A broken one (no process of ours leaves any) counts as missing."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._shards:
                continue
            try:
                with safe_open(path, framework="pt") as shard:
                    keys = shard.get_tensor(KEYS).numpy()
            except (SafetensorError, OSError) as error:
                log.warning("%s cannot be read (%s); what was in it is computed again", path, error)
                continue
            self._shards.add(path.name)
            self._rows |= {row.tobytes(): (path.name, index) for index, row in enumerate(keys)}

    def has(self, block: str) -> bool:
        """Whether a block of work is done, by anyone."""
        name = f"{block}.safetensors"
        if name not in self._shards and (self.folder / name).is_file():
            self.refresh()
        return name in self._shards

    def read(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """Rows of keys that are in the cache, stacked in their order, in the dtype of the disk."""
        rows = []
        for key in keys:
            shard, index = self._rows[key]
            rows.append({name: part[index] for name, part in _open(self.folder / shard).items()})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def block(self, block: str) -> dict[str, Tensor]:
        """All columns of a block that is done."""
        return _open(self.folder / f"{block}.safetensors")

    def write(self, block: str, keys: Sequence[Key], columns: Columns) -> None:
        """Add a shard in one move. Floats are stored in the spec's dtype.

        Raises:
            InputError: a value is too large for that dtype.
        """
        dtype = getattr(torch, self.spec.dtype)
        rows = {
            name: (column.to(dtype) if column.is_floating_point() else column).cpu().contiguous()
            for name, column in columns.items()
        }
        if any(part.is_floating_point() and not part.isfinite().all() for part in rows.values()):
            raise InputError(
                f"{self.spec.kind} of {self.spec.model} go beyond {self.spec.dtype}; give a wider cache_dtype"
            )
        rows[KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, 16) if keys else _NONE
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = self.folder / "spec.json"
        if not spec.is_file():
            _put(spec, lambda path: path.write_text(json.dumps(asdict(self.spec), indent=2) + "\n", encoding="utf-8"))
        _put(self.folder / f"{block}.safetensors", lambda path: save_file(rows, path))
        self.refresh()


@dataclass(frozen=True)
class Filled:
    """What one process did."""

    blocks: int
    rows: int  # encoded
    found: int  # of those blocks, rows that were in the cache already


Encode = Callable[[int, Callable[[], None]], tuple[Sequence[Key], Columns, int]]


def fill(
    cache: Cache, blocks: Sequence[str], encode: Encode, first: int = 0, stale_after: float = STALE_AFTER
) -> Filled:
    """Do what is missing of `blocks`, beside any other processes that fill the same cache; return when all is done.

    Each block is claimed before it is begun. One whose process died is taken over: at once on the same host, after
    `stale_after` seconds without a sign of life from another.

    Args:
        blocks: a name for each block, from all that decides its content.
        encode: number of a block, and what to call now and then as a sign of life -> keys, columns, and how many rows
            it left out because the cache has them.
        first: block to begin at, so that processes do not all start at the same one.
    """
    done = rows = found = 0
    cache.folder.mkdir(parents=True, exist_ok=True)
    waiting = [*range(first, len(blocks)), *range(min(first, len(blocks)))]
    while waiting := [number for number in waiting if not cache.has(blocks[number])]:
        progress = False
        for number in waiting:
            with _claimed(cache, blocks[number], stale_after) as beat:
                if beat is None:
                    continue
                cache.refresh()  # others may have added the same rows in blocks of theirs
                keys, columns, known = encode(number, beat)
                cache.write(blocks[number], keys, columns)
                done, rows, found, progress = done + 1, rows + len(keys), found + known, True
        if not progress:
            time.sleep(POLL)
    return Filled(done, rows, found)


def content_key(*parts: bytes) -> Key:
    """Of what goes into an encoder; parts are kept apart."""
    return _digest(*parts)


def pixels_key(pixels: Tensor) -> Key:
    """Of `[3, H, W]` in [-1, 1] that were made of 8-bit values, as `to_pixels` does."""
    levels = pixels.mul(127.5).add(127.5).round().to(torch.uint8).cpu().contiguous()
    return _digest(str(tuple(levels.shape)).encode(), levels.numpy().tobytes())


def text_key(text: str) -> Key:
    return _digest(text.encode())


def record_key(record: Record) -> Key:
    """Of a record without opening its images: of a file, its place, size and time of change stand for its content; of a
    picture in a shard those of the shard, of one in a data set of the hub that set's fingerprint."""
    files = tuple(map(_stamp, (record.image, record.negative_image, *record.more_negative_images)))
    texts = (record.captions, record.expressions, tuple(negative.caption for negative in record.negatives))
    return _digest(repr((record.source, record.id, files, texts)).encode())


def _stamp(image: ImageSource | None) -> tuple[object, ...] | None:
    if isinstance(image, Path):
        return file_stamp(image)
    own = getattr(image, "stamp", None)  # a drawn picture has none, and is what its record's id says
    return None if own is None else tuple(own())


@contextmanager
def _claimed(cache: Cache, block: str, stale_after: float) -> Iterator[Callable[[], None] | None]:
    """A sign-of-life function while the block is ours; None if it is another's, or done.

    Claim n + 1 is made where claim n is stale. Making a file that must not exist is atomic, so two processes that find
    the same stale claim cannot both take over.
    """
    claims = sorted(cache.folder.glob(f"{block}.claim.*"), key=_number)
    if claims and not _is_stale(claims[-1], stale_after):
        yield None
        return
    mine = cache.folder / f"{block}.claim.{_number(claims[-1]) + 1 if claims else 0}"
    try:
        with mine.open("x", encoding="utf-8") as file:
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    except FileExistsError:
        yield None
        return
    for left in cache.folder.glob(f"{block}.safetensors.*.partial"):  # of a process that died
        left.unlink(missing_ok=True)
    try:
        yield None if cache.has(block) else partial(_touch, mine)  # finished between the look and the claim
    finally:
        for claim in [*claims, mine]:
            claim.unlink(missing_ok=True)


def _touch(claim: Path) -> None:
    with suppress(FileNotFoundError):  # taken over while this process was held up
        os.utime(claim)


def _number(claim: Path) -> int:
    return int(claim.suffix[1:])


def _is_stale(claim: Path, stale_after: float) -> bool:
    try:
        age = time.time() - claim.stat().st_mtime
        owner: dict[str, Any] = json.loads(claim.read_text(encoding="utf-8"))
        if owner["host"] == socket.gethostname():
            process = psutil.Process(owner["pid"])
            reused = process.create_time() > claim.stat().st_mtime  # the number went to a younger process
            return reused or process.status() == psutil.STATUS_ZOMBIE or age > stale_after
    except FileNotFoundError:  # released in this moment
        return False
    except psutil.NoSuchProcess:
        return True
    except ValueError:  # not written out yet
        pass
    return age > stale_after


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside, to the disk, then rename."""
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    write(unfinished)
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@lru_cache(maxsize=256)
def _open(path: Path) -> dict[str, Tensor]:
    """Columns of a shard; their pages are read when rows are."""
    with safe_open(path, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys() if name != KEYS}  # noqa: SIM118


_NONE = torch.zeros(0, 16, dtype=torch.uint8)


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
