"""A step whose loss or gradient is not finite: what is said of it, and the batch that is kept for a look."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.encode import Encoded

FOLDER = "nan"
KEPT = 10  # batches of a run: with `on_nan: skip` a run of days would fill the disk


def describe(terms: Sequence[Mapping[str, float]], norm: float, records: Sequence[Sequence[int]]) -> str:
    """What is not finite, and in which records of the data; `terms` and `records` are of each micro-batch."""
    broken = [(rows, row) for rows, row in zip(records, terms, strict=True) if not _finite(row.values())]
    if broken:
        rows, row = broken[0]
        return f"the loss is not finite, records {list(rows)}: {row}"
    return f"the gradient is not finite (norm {norm}), records {[list(rows) for rows in records]}"


def save_batch(run: Path, step: int, rank: int, window: Sequence[tuple[Encoded, Draw]], said: str) -> str:
    """Write `run/nan/step-N-rank-R.safetensors`: all that the objective was given, and `said` in its header.

    Returns:
        Where it is, or why it was not written: `KEPT` are there already, or the disk refuses; the error itself matters
        more.
    """
    path = run / FOLDER / f"step-{step}-rank-{rank}.safetensors"
    if len(list(path.parent.glob("*.safetensors"))) >= KEPT:
        return f"its batch is not kept, {path.parent} holds {KEPT}"
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for micro, pair in enumerate(window)
        for part in pair
        for name, value in _tensors(f"{micro}", part)
    }
    header = {"format": "pt", "said": said, "records": json.dumps([list(batch.records) for batch, _ in window])}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=header)
    except (OSError, SafetensorError) as error:
        return f"its batch could not be saved ({error})"
    return f"its batch is in {path}"


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)


def _finite(values: Any) -> bool:
    return all(abs(value) < float("inf") for value in values)  # false for NaN too
