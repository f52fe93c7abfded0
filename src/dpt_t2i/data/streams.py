"""Tar shards read from front to back as training goes: for data that no index should hold, or that lie elsewhere.

A process with W loader workers is W streams. Each pass deals all shards out anew, every one to one stream, and a stream
shows each of its records once before it begins the next pass. So what is seen follows from (seed, number of streams)
and, unlike with indexed data, changes with the number of processes and workers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dpt_t2i.config import TrainDataConfig
from dpt_t2i.data.examples import Batch, Item, Part, View, loader_options, stand_in
from dpt_t2i.data.excluded import excluded_pictures, without
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.layouts import streamed_shards
from dpt_t2i.data.records import Record
from dpt_t2i.data.shards import stream_shards
from dpt_t2i.errors import InputError

log = logging.getLogger(__name__)


class ShardStream:
    """Examples of tar shards; random negatives come from the records that are in memory.

    Args:
        shards: files or http(s) addresses.
        resolution: side of the squares in pixels.
        buffer: records of a stream in memory, shown in random order.
        on_bad: `skip` leaves broken records and shards out, and shows another record for a picture that is broken.
        excluded: COCO ids of pictures that must not be shown.
    """

    def __init__(
        self,
        shards: Sequence[str],
        resolution: int,
        seed: int,
        view: View,
        *,
        buffer: int = 1000,
        on_bad: Literal["error", "skip"] = "error",
        excluded: set[str] | None = None,
    ) -> None:
        self.shards, self.resolution, self.seed, self.view = tuple(shards), resolution, seed, view
        self.buffer, self.on_bad, self.excluded = buffer, on_bad, excluded or set()

    def loader(self, part: Part, workers: int) -> DataLoader[Batch]:
        """A rank's batches, from its first step on.

        Raises:
            InputError: a stream would get no shard.
        """
        streams = part.world * max(1, workers)
        if streams > len(self.shards):
            raise InputError(
                f"{len(self.shards)} shards cannot be dealt out to {streams} streams (processes x loader workers); "
                "lower dataloader_num_workers, or cut the data into more shards"
            )
        stretch: Any = _Stretch(self, part, max(1, workers))
        return DataLoader(stretch, batch_size=part.batch_size, **loader_options(workers))

    def identity(self, workers: int, processes: int) -> dict[str, Any]:
        """All that decides which examples come, beside seed and batch: a run that goes on must have the same."""
        crop = {"center_crop": self.view.center_crop, "random_flip": self.view.random_flip}
        stream = {"shards": len(self.shards), "shuffle_buffer": self.buffer, "loader_workers": max(1, workers)}
        return stream | {"num_processes": processes} | crop

    def items(self, stream: int, streams: int, skip: int = 0) -> Iterator[Item]:
        """Examples of one of the streams, without an end; the first `skip` are passed by, undecoded.

        What is broken on the way to an example goes along with it (`Item.skipped`): a loader worker does not speak.

        Raises:
            InputError: with `on_bad: error` anything that is broken; in any case where a pass shows nothing.
        """
        faults, shown, told = Faults(self.on_bad, quiet=True), 0, 0
        for turn in count():
            before, rng = shown, np.random.default_rng([self.seed, turn, stream])
            for pool, place in shuffled(self._records(turn, stream, streams, faults), self.buffer, rng):
                if shown >= skip:
                    make = partial(self._item, pool, shown * streams + stream)
                    item = stand_in(make, place, len(pool)) if self.on_bad == "skip" else make(place)
                    broken, told = faults.found[told:], len(faults.found)
                    yield replace(item, skipped=(*(f"{f.where}: {f.reason}" for f in broken), *item.skipped))
                shown += 1
            if shown == before:
                why = "".join(f" (the first fault: {f.where}: {f.reason})" for f in faults.found[:1])
                raise InputError(f"no whole record in the shards of stream {stream} of {streams}{why}; give others")

    def _item(self, pool: Sequence[Record], number: int, row: int) -> Item:
        rng = np.random.default_rng([self.seed, number, row])
        return replace(self.view.item(pool, row, rng, (self.resolution, self.resolution)), record=number)

    def _records(self, turn: int, stream: int, streams: int, faults: Faults) -> Iterator[Record]:
        """Of one pass over the shards that are this stream's in it."""
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.shards))
        left_out = 0
        for record in stream_shards([self.shards[i] for i in order], stream, streams, faults=faults):
            if self.excluded and not record.coco_id:
                faults.report(f"{record.source}/{record.id}", "no `image_id`, which exclude_refs needs")
            elif record.coco_id in self.excluded:
                left_out += 1
            else:
                yield without(record, self.excluded)
        if left_out:
            log.info("%d records left out of a pass: they show images of RefCOCO's validation and test", left_out)


class _Stretch(IterableDataset[Item]):
    """What a rank shows between two steps. Loader worker w gives the batches w, w + W, ... of the rank, from step 0
    on; a loader that begins later asks its workers from 0 again, so they change their names."""

    def __init__(self, stream: ShardStream, part: Part, workers: int) -> None:
        self.stream, self.part, self.workers = stream, part, workers

    def __iter__(self) -> Iterator[Item]:
        info, batches, size = get_worker_info(), self.part.micro_batches, self.part.batch_size
        worker = ((info.id if info else 0) + batches.start) % self.workers
        before, after = (len(range(worker, end, self.workers)) for end in (batches.start, batches.stop))
        number, streams = self.part.rank * self.workers + worker, self.part.world * self.workers
        yield from islice(self.stream.items(number, streams, skip=before * size), (after - before) * size)


def shuffled(
    records: Iterable[Record], buffer: int, rng: np.random.Generator
) -> Iterator[tuple[Sequence[Record], int]]:
    """Each record once, in random order, as (those in memory, its place among them). Others may stand there that were
    shown before: they serve as random negatives to the last."""
    pool: list[Record] = []
    for record in records:
        if len(pool) < buffer:
            pool.append(record)
            continue
        place = int(rng.integers(len(pool)))
        yield pool, place
        pool[place] = record
    for place in rng.permutation(len(pool)):
        yield pool, int(place)


def open_stream(config: TrainDataConfig, resolution: int, view: View) -> ShardStream:
    """The shards to train on.

    Raises:
        InputError: there are none, or the settings ask for what needs an index.
    """
    if config.max_samples is not None:
        raise InputError("max_samples does not go with streamed shards; name fewer shards")
    if config.aspect_buckets:
        raise InputError("aspect_buckets does not go with streamed shards, whose pictures are not known beforehand")
    return ShardStream(
        streamed_shards(config)[0],
        resolution,
        config.data_seed,
        view,
        buffer=config.shuffle_buffer,
        on_bad=config.on_bad,
        excluded=excluded_pictures(config),
    )
