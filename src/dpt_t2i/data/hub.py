"""Hugging Face `datasets`: a name or folder, streamed or not (extra `[data]`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from dpt_t2i.data.faults import Faults, sound
from dpt_t2i.data.fields import table, text
from dpt_t2i.data.imagefolder import native_record
from dpt_t2i.data.records import Record
from dpt_t2i.data.shards import EncodedImage
from dpt_t2i.errors import InputError

COLUMN = "image"


@dataclass(frozen=True, slots=True)
class HubImage:
    """The picture of a row, decoded when it is used."""

    dataset: Any
    row: int

    def __call__(self) -> Image.Image:
        try:
            return _stored(self.dataset[self.row][COLUMN], f"row {self.row}")()
        except ValueError as error:
            raise InputError(f"row {self.row} of the data set: {error}; mend it, or use on_bad: skip") from error

    def stamp(self) -> tuple[object, ...]:
        """What stands for the content: the data set's own fingerprint."""
        return getattr(self.dataset, "_fingerprint", ""), self.row


def read_hub(
    name: str, split: str, *, streaming: bool = False, limit: int | None = None, faults: Faults | None = None
) -> Iterator[Record]:
    """Records of a data set with a column `image` and the native fields (`captions`, or one text as `caption`, `text`).

    Args:
        name: hub id, or a folder (also one of `save_to_disk`).
        streaming: fetch rows one after the other; the first `limit` are kept in memory as files.

    Raises:
        InputError: `datasets` is not installed, the data set or split is not to be had, it has no column `image`, or a
            stream without a limit; or a broken record, unless `faults` skips such.
    """
    if streaming and limit is None:
        raise InputError(f"data set `{name}`: a stream has no end that we know; give max_samples")
    dataset = _load(name, split, streaming)
    columns = dataset.column_names
    if columns is None:
        raise InputError(f"data set `{name}` does not tell its columns while it is streamed; leave out --streaming")
    if COLUMN not in columns:
        raise InputError(f"data set `{name}` has no column `{COLUMN}`, only {', '.join(columns)}")
    faults = faults or Faults()
    yield from sound(_records(dataset, name, streaming, limit, faults), faults)


def _records(
    dataset: Any, name: str, streaming: bool, limit: int | None, faults: Faults
) -> Iterator[tuple[str, Record]]:
    encoded = _reach(name, _undecoded, dataset)
    rows = encoded if streaming else encoded.remove_columns(COLUMN)
    for number, row in enumerate(islice(_each(rows, name), limit)):
        where = f"data set `{name}`, row {number}"
        image = row.pop(COLUMN) if streaming else HubImage(encoded, number)
        record = faults.attempt(where, _record, row, image, name, number)
        if record is not None:
            yield where, record


def _record(row: Mapping[str, Any], image: Any, name: str, number: int) -> Record:
    fields = {key: value for key, value in table(row).items() if key != "negative_file"}  # its file is not in the row
    source = image if isinstance(image, HubImage) else _stored(image, f"row {number} of {name}")
    return native_record(fields, name.rstrip("/").rpartition("/")[2], str(number), source, Path())


def _stored(value: Any, where: str) -> EncodedImage:
    """The bytes of an undecoded image cell, or ValueError."""
    cell = table(value, f"column `{COLUMN}`")
    if isinstance(cell.get("bytes"), bytes):
        return EncodedImage(cell["bytes"], where)
    if cell.get("path") is None:
        raise ValueError(f"column `{COLUMN}` has neither bytes nor a path")
    path = text(cell["path"], "path")
    try:
        return EncodedImage(Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error.strerror}") from error


def _undecoded(dataset: Any) -> Any:
    from datasets import Image as ImageFeature

    return dataset.cast_column(COLUMN, ImageFeature(decode=False))


def split_names(name: str) -> Sequence[str]:
    """The splits of a data set.

    Raises:
        InputError: `datasets` is not installed, or there is no such data set.
    """
    datasets = _library()
    if _is_stored(name):
        stored = _reach(name, datasets.load_from_disk, name)
        return list(stored) if isinstance(stored, datasets.DatasetDict) else []
    return _reach(name, datasets.get_dataset_split_names, name)


def _load(name: str, split: str, streaming: bool) -> Any:
    datasets = _library()
    if not _is_stored(name):
        return _reach(name, datasets.load_dataset, name, split=split, streaming=streaming)
    stored = _reach(name, datasets.load_from_disk, name)
    if not isinstance(stored, datasets.DatasetDict):
        return stored
    if split not in stored:
        raise InputError(f"data set `{name}` has no split `{split}`; it has {', '.join(stored)}")
    return stored[split]


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError('data_format huggingface needs `datasets`: pip install "dpt-t2i[data]"') from error
    return datasets


def _is_stored(name: str) -> bool:
    return any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _each(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """The rows; what their source raises on the way is told as when it is opened."""
    remaining = iter(rows)
    end = object()
    while (row := _reach(name, next, remaining, end)) is not end:
        yield row


def _reach(name: str, load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return load(*arguments, **options)
    except Exception as error:  # a loader of many sources raises errors of many kinds
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot load data set `{name}`: {type(error).__name__}: {reason}") from error
