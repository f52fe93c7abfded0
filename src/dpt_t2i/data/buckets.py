"""Aspect-ratio buckets: pictures keep nearly all of their width and height, and a step shows one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dpt_t2i.data.records import Record
from dpt_t2i.data.transforms import nearest_bucket
from dpt_t2i.errors import InputError

Size = tuple[int, int]  # width, height in pixels


class Buckets:
    """Which shape each record is shown in, and epochs made of whole steps of one shape.

    In an epoch every record is shown; where those of a shape do not fill its last step, some are shown twice.

    Args:
        sizes: of each record.
        step: examples of an optimiser step, over all processes.
    """

    def __init__(self, sizes: Sequence[Size], step: int) -> None:
        self.shapes, self.step = sorted(set(sizes)), step
        self._shape_of = np.array([self.shapes.index(size) for size in sizes])
        self._drawn: tuple[tuple[int, int], np.ndarray] | None = None  # the epoch that was asked for last

    def __len__(self) -> int:
        """Examples of an epoch."""
        return sum(-(-count // self.step) * self.step for count in Counter(self._shape_of.tolist()).values())

    def size(self, row: int) -> Size:
        return self.shapes[self._shape_of[row]]

    def row(self, seed: int, epoch: int, place: int) -> int:
        """Record at a place of an epoch."""
        if self._drawn is None or self._drawn[0] != (seed, epoch):
            self._drawn = (seed, epoch), self._draw(seed, epoch)
        return int(self._drawn[1][place])

    def counts(self) -> dict[Size, int]:
        """Records of each shape."""
        return {shape: int((self._shape_of == number).sum()) for number, shape in enumerate(self.shapes)}

    def _draw(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        rows, steps = rng.permutation(len(self._shape_of)), []
        for shape in range(len(self.shapes)):
            mine = rows[self._shape_of[rows] == shape]
            steps.append(np.resize(mine, -(-len(mine) // self.step) * self.step).reshape(-1, self.step))
        return rng.permutation(np.concatenate(steps)).reshape(-1)


def sort_into_buckets(records: Sequence[Record], resolution: int, step: int, *, skip_bad: bool = False) -> Buckets:
    """Look at the size of every picture; the shapes are those of diffusers, with about `resolution`^2 pixels.

    Raises:
        InputError: a picture cannot be read and may not be left out, or this diffusers is too old.
    """
    shapes = bucket_shapes(resolution)
    return Buckets([nearest_bucket(_size(record, skip_bad), shapes) for record in records], step)


def bucket_shapes(resolution: int) -> list[Size]:
    """From 1:2 to 2:1, the square first; sides are multiples of an eighth of `resolution`."""
    try:
        from diffusers.training_utils import generate_aspect_ratio_buckets
    except ImportError as error:
        raise InputError("aspect_buckets needs a newer diffusers; upgrade it, or leave out the flag") from error
    return [(width, height) for height, width in generate_aspect_ratio_buckets(resolution, max(1, resolution // 8))]


def _size(record: Record, skip_bad: bool) -> Size:
    try:
        return record.image_size()
    except InputError:
        if not skip_bad:
            raise
        return (1, 1)  # another record stands in when its turn comes
