"""From records to training examples: which caption, which expression, which negatives, in which order.

Every choice is a function of (seed, epoch, index), never of a worker or a rank: the same epoch on one process or
four, with any number of loader workers, shows the same examples.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpt_t2i.data.buckets import Buckets
from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.data.transforms import Box, fit, mirror, names_a_side, to_pixels
from dpt_t2i.errors import InputError

log = logging.getLogger(__name__)

Choice = TypeVar("Choice")
MakeNegatives = Callable[[str], Sequence[Negative]]  # hard captions of a caption, made by rule; () where none applies
PATIENCE = 3.0  # seconds in which several signals are one
TRIES = 20  # draws for a random negative that is false both ways


@dataclass(frozen=True)
class Item:
    """One example; pixels are float32 `[3, H, W]` in [-1, 1], squares unless there are buckets."""

    pixels: Tensor
    hard_pixels: Tensor | None  # None: the source has no hard-negative image
    random_pixels: Tensor | None  # None: negatives were not asked for
    caption: str
    hard_caption: str | None  # None: the source has no hard-negative caption
    random_caption: str
    expression: Expression | None  # None: nothing to ground
    boxes: Tensor  # [n, 4] cxcywh in [0, 1], of the expression; n = 0 without one
    record: int  # row of the source
    hard_pair: bool = False  # whether the hard caption is true of the hard picture
    skipped: tuple[str, ...] = ()  # what is wrong with the records in whose place it stands


@dataclass(frozen=True)
class Batch:
    """B examples. Where something is missing, its mask is False and its place is filled with zeros or ""."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    hard_images: Tensor  # [B, 3, H, W]
    random_images: Tensor  # [B, 3, H, W]
    captions: tuple[str, ...]
    hard_captions: tuple[str, ...]
    random_captions: tuple[str, ...]
    has_hard_image: Tensor  # [B] bool
    has_random_image: Tensor  # [B] bool
    has_hard_caption: Tensor  # [B] bool
    hard_pair: Tensor  # [B] bool: the hard caption is true of the hard image
    expressions: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]  # B x n_i character ranges of the expression, one a box
    boxes: tuple[Tensor, ...]  # B tensors [n_i, 4] cxcywh in [0, 1]
    records: tuple[int, ...]  # rows of the source
    skipped: tuple[str, ...] = ()  # what is wrong with records that were left out

    def __len__(self) -> int:
        return len(self.captions)

    def num_boxes(self) -> int:
        return sum(len(boxes) for boxes in self.boxes)


@dataclass(frozen=True)
class View:
    """How a record becomes an example.

    Args:
        center_crop: False = a crop anywhere; both keep the boxes.
        random_flip: mirror half of the examples whose captions and expression name no side. All three pictures of an
            example are mirrored together, so that no text is true of one for its side only.
        make_negatives: hard captions for records that have no negative of their own; what it makes need not be true of
            a picture that is one.
        alone: the picture and its caption are all that is shown, which is what the denoising loss looks at; without
            crops and flips both are what they would be among negatives.
    """

    center_crop: bool = True
    random_flip: bool = False
    make_negatives: MakeNegatives | None = None
    alone: bool = False

    def item(self, records: Sequence[Record], row: int, rng: np.random.Generator, size: tuple[int, int]) -> Item:
        """Record `row` as `rng` draws it, its random negative another one of `records`; size = width, height.

        Raises:
            InputError: a picture cannot be read, a box is outside its image, or all records show one picture.
        """
        record = records[row]
        caption = record.captions[int(rng.integers(len(record.captions)))]
        if record.negative_image is not None and len(record.captions) > 1:  # of the first alone is it said to be false
            caption = record.captions[0] if rng.random() < 0.5 else caption
            if caption != record.captions[0]:
                record = replace(record, negative_image=None, more_negative_images=())
        if self.alone:
            return self._picture(record, row, caption, rng, size)
        expression = _choose(record.expressions, rng)
        negatives = hard_captions(record, caption, self.make_negatives)
        negative = negatives[0] if record.has_pair else _choose(negatives, rng)
        hard_image = int(rng.integers(1 + len(record.more_negative_images))) if record.more_negative_images else 0
        other, random_caption = random_negative(records, row, caption, rng)
        texts = (caption, negative.caption if negative else "", expression.text if expression else "")
        show = self._lens(texts, rng, size)
        picture, keep = record.load_image(), expression.boxes if expression else ()
        record.require_inside(keep, picture.size)
        pixels, boxes = show(picture, keep)
        hard = record.load_negative_image(hard_image)
        return Item(
            pixels=pixels,
            hard_pixels=None if hard is None else show(hard)[0],
            random_pixels=show(other.load_image())[0],
            caption=caption,
            hard_caption=negative.caption if negative else None,
            random_caption=random_caption,
            expression=expression,
            boxes=boxes,
            record=row,
            hard_pair=record.has_pair,
        )

    def _picture(self, record: Record, row: int, caption: str, rng: np.random.Generator, size: tuple[int, int]) -> Item:
        """The example without negatives and expression."""
        pixels, boxes = self._lens((caption,), rng, size)(record.load_image())
        return Item(pixels, None, None, caption, None, "", None, boxes, row)

    def _lens(
        self, texts: Sequence[str], rng: np.random.Generator, size: tuple[int, int]
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """How all pictures of an example with these texts are cut: (picture, boxes to keep) -> pixels, boxes."""
        flip = self.random_flip and rng.random() < 0.5 and not any(map(names_a_side, texts))

        def show(picture: Image.Image, keep: Sequence[Box] = ()) -> tuple[Tensor, Tensor]:
            at = None if self.center_crop else (float(rng.random()), float(rng.random()))
            fitted, boxes = fit(picture, keep, size, at)
            fitted, boxes = mirror(fitted, boxes) if flip else (fitted, boxes)
            return to_pixels(fitted), boxes

        return show


VIEW = View()


def hard_captions(record: Record, caption: str, make: MakeNegatives | None) -> Sequence[Negative]:
    """The record's own, else what `make` makes of `caption`, where no picture is its negative: of that it need not be
    true."""
    if record.negatives or record.negative_image is not None or make is None:
        return record.negatives
    return tuple(made for made in make(caption) if made.caption not in record.captions)


class LeftOut:
    """Says once what was left out, and counts it. Loader workers send it along with their examples."""

    def __init__(self) -> None:
        self.said: dict[str, None] = {}  # in this order

    def report(self, messages: Iterable[str]) -> None:
        for message in messages:
            if message not in self.said:
                self.said[message] = None
                log.warning("left out (%d so far): %s", len(self.said), message)


def stand_in(make: Callable[[int], Item], row: int, count: int) -> Item:
    """`make(row)`, or of the next row in a circle of `count` that can be read and whose boxes are inside its image.

    Raises:
        InputError: there is none.
    """
    skipped: list[str] = []
    for step in range(count):
        try:
            return replace(make((row + step) % count), skipped=tuple(skipped))
        except InputError as error:
            if step == count - 1:
                raise
            skipped.append(str(error))
    raise AssertionError("there are records")


class Examples(Dataset[Item]):
    """An endless stream over records: position p is example `order(epoch)[p % N]` of epoch `p // N`.

    Args:
        resolution: side of the squares in pixels.
        skip_bad: show the next record in place of one that cannot be read, or whose box is outside its image.
        buckets: shapes of the examples, and then their order; None = squares.
    """

    def __init__(
        self,
        records: Sequence[Record],
        resolution: int,
        seed: int = 0,
        view: View = VIEW,
        *,
        skip_bad: bool = False,
        buckets: Buckets | None = None,
    ) -> None:
        if len(records) < 2:
            raise InputError(
                f"at least two records are needed, each is the other's random negative; the data set has {len(records)}"
            )
        self.records, self.resolution, self.seed, self.view = records, resolution, seed, view
        self.buckets = buckets
        self.skip_bad = skip_bad

    def __getitem__(self, position: int) -> Item:
        epoch, place = divmod(position, len(self.records if self.buckets is None else self.buckets))
        if self.buckets is not None:
            return self.item(epoch, self.buckets.row(self.seed, epoch, place))
        return self.item(epoch, int(_order(self.seed, epoch, len(self.records))[place]))

    def item(self, epoch: int, row: int) -> Item:
        """Record `row` as it is shown in an epoch.

        Raises:
            InputError: a picture cannot be read or a box is outside its image, and nothing may stand in its place.
        """
        size = (self.resolution, self.resolution) if self.buckets is None else self.buckets.size(row)
        make = partial(self._item, epoch, size)
        return stand_in(make, row, len(self.records)) if self.skip_bad else make(row)

    def loader(self, part: Part, workers: int) -> DataLoader[Batch]:
        """A rank's batches, from its first step on."""
        return DataLoader(self, batch_sampler=MicroBatches(part), **loader_options(workers))  # type: ignore[arg-type]

    def identity(self, workers: int, processes: int) -> dict[str, Any]:
        """All that decides which examples come, beside seed and batch: a run that goes on must have the same."""
        crop = {"center_crop": self.view.center_crop, "random_flip": self.view.random_flip}
        return {"records": len(self.records), "aspect_buckets": self.buckets is not None} | crop

    def _item(self, epoch: int, size: tuple[int, int], row: int) -> Item:
        rng = np.random.default_rng([self.seed, epoch, row])
        return self.view.item(self.records, row, rng, size)


def loader_options(workers: int) -> dict[str, Any]:
    """What every loader of examples has in common."""
    leaving = multiprocessing.RawValue("b", False)  # told without a lock, which a signal could interrupt
    if workers > 0:
        atexit.register(setattr, leaving, "value", True)  # before multiprocessing ends its processes and waits for them
    return {"collate_fn": collate, "num_workers": workers, "worker_init_fn": partial(bear_a_signal, leaving)}


def bear_a_signal(leaving: Any, _worker: int) -> None:
    """In a loader's process the first SIGTERM or SIGINT is let pass, and what comes close behind it.

    Who takes a machine away signals all processes of a run, and the launcher sends it on to them once more; this one is
    needed until the step is done, and ends with its loader.

    Args:
        leaving: a shared value, true when the process that it works for is about to end.
    """
    since: list[float] = []

    def bear(number: int, _frame: FrameType | None) -> None:
        since.append(time.monotonic())
        if leaving.value or since[-1] - since[0] > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, bear)


def random_negative(records: Sequence[Record], row: int, caption: str, rng: np.random.Generator) -> tuple[Record, str]:
    """A record of another picture than that of `row`, and one of its captions; in 20 draws one is looked for whose
    captions and those of `row` are not true of both pictures, as far as that is known.

    Raises:
        InputError: all records show one picture.
    """
    count, record = len(records), records[row]
    own = record.picture
    found = None
    for _ in range(TRIES if count > 1 else 0):
        index = int(rng.integers(count - 1))
        other = records[index + (index >= row)]
        if other.picture == own:
            continue
        found = other, other.captions[int(rng.integers(len(other.captions)))]
        if found[1] not in record.captions and caption not in other.captions and not _share_a_caption(record, other):
            return found
    if found is not None:
        return found
    for step in range(1, count):  # nearly all records show this picture
        other = records[(row + step) % count]
        if other.picture != own:
            return other, other.captions[int(rng.integers(len(other.captions)))]
    raise InputError(f"all {count} records show the picture `{own}`: there is no random negative; give others")


def _share_a_caption(one: Record, other: Record) -> bool:
    """Whether the caption of one is known to be true of the other's picture too."""
    return any(a.also_true is not None and a.also_true(b) for a, b in ((one, other), (other, one)))


@dataclass(frozen=True)
class Part:
    """Which batches a process gets: its micro-batches of the optimiser steps `[first_step, steps)`."""

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1
    first_step: int = 0
    steps: int = 1

    @property
    def micro_batches(self) -> range:
        """Their numbers, counted from step 0."""
        return range(self.first_step * self.accumulation, self.steps * self.accumulation)


class MicroBatches:
    """Positions of each micro-batch of a part (a DataLoader's `batch_sampler`).

    Micro-batch a of step s covers positions `[(s * A + a) * W * B, ...)`; rank r takes its r-th part of B.
    """

    def __init__(self, part: Part) -> None:
        self.part = part

    def __iter__(self) -> Iterator[list[int]]:
        size = self.part.batch_size
        for micro in self.part.micro_batches:
            start = (micro * self.part.world + self.part.rank) * size
            yield list(range(start, start + size))

    def __len__(self) -> int:
        return len(self.part.micro_batches)


def collate(items: Sequence[Item]) -> Batch:
    """Stack examples."""
    blank = torch.zeros_like(items[0].pixels)
    return Batch(
        images=torch.stack([item.pixels for item in items]),
        hard_images=torch.stack([blank if item.hard_pixels is None else item.hard_pixels for item in items]),
        random_images=torch.stack([blank if item.random_pixels is None else item.random_pixels for item in items]),
        captions=tuple(item.caption for item in items),
        hard_captions=tuple(item.hard_caption or "" for item in items),
        random_captions=tuple(item.random_caption for item in items),
        has_hard_image=torch.tensor([item.hard_pixels is not None for item in items]),
        has_random_image=torch.tensor([item.random_pixels is not None for item in items]),
        has_hard_caption=torch.tensor([item.hard_caption is not None for item in items]),
        hard_pair=torch.tensor([item.hard_pair for item in items]),
        expressions=tuple(item.expression.text if item.expression else "" for item in items),
        spans=tuple(item.expression.spans if item.expression else () for item in items),
        boxes=tuple(item.boxes for item in items),
        records=tuple(item.record for item in items),
        skipped=tuple(message for item in items for message in item.skipped),
    )


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _choose(choices: Sequence[Choice], rng: np.random.Generator) -> Choice | None:
    return choices[int(rng.integers(len(choices)))] if choices else None
