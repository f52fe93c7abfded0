"""What each optimiser step sees: examples, noise, timesteps, dropped captions, all a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from dpt_t2i.config import DataConfig, TrainConfig
from dpt_t2i.data.examples import Batch, Examples, LeftOut, Part
from dpt_t2i.data.streams import ShardStream
from dpt_t2i.errors import InputError
from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.encode import Encoded, Encoder

Window = list[tuple[Encoded, Draw]]  # the micro-batches of one optimiser step on this process


@dataclass(frozen=True)
class Feed:
    """Where the micro-batches of a run come from."""

    encoder: Encoder
    examples: Examples | ShardStream
    train: TrainConfig
    data: DataConfig
    caption_dropout: float
    seed: int
    refresh: Callable[[int, Batch], Batch] | None = None  # may replace examples of a batch (on-policy negatives)
    left_out: LeftOut = field(default_factory=LeftOut)  # what this process met


def windows(feed: Feed, accelerator: Accelerator, first: int) -> Iterator[Window]:
    """The encoded micro-batches of each optimiser step from `first` on."""
    settings, world, rank = feed.train, accelerator.num_processes, accelerator.process_index
    accumulation = settings.gradient_accumulation_steps
    part = Part(settings.train_batch_size, accumulation, rank, world, first, settings.max_train_steps)
    stream = iter(feed.examples.loader(part, feed.data.dataloader_num_workers))
    for step in range(first, settings.max_train_steps):
        window: Window = []
        parts: list[Draw] = []
        for micro in range(accumulation):
            batch = _next(stream)
            batch = batch if feed.refresh is None else feed.refresh(step, batch)
            feed.left_out.report(batch.skipped)
            encoded = feed.encoder(batch)
            parts = parts or draws(feed, step, accumulation * world, len(encoded), encoded.latents)
            window.append((encoded, parts[micro * world + rank].to(encoded.latents.device)))
        yield window


def draws(feed: Feed, step: int, parts: int, count: int, like: Tensor) -> list[Draw]:
    """Noise, timesteps and dropped captions of a whole optimiser step, in the order of its examples, cut into parts.

    So 1 process x batch 8, 2 x 4 and 1 x 4 with accumulation 2 all see the same. They are on the CPU: a process takes
    its own part to its device.
    """
    total, settings = parts * count, feed.train
    generator = torch.Generator().manual_seed(mix(feed.seed, step, 0) ^ 0x5EED)
    noise = torch.randn(total, *like.shape[1:], generator=generator)
    timesteps = torch.randint(settings.min_timestep, settings.max_timestep + 1, (total,), generator=generator)
    drop = torch.rand(total, generator=generator) < feed.caption_dropout
    split = zip(noise.split(count), timesteps.split(count), drop.split(count), strict=True)
    return [Draw(*part) for part in split]


def mix(seed: int, step: int, rank: int) -> int:
    """One number from three, without collisions in any run of less than 2^31 steps."""
    return ((seed * 1_000_003 + rank) * 2**31 + step) % 2**63


def _next(stream: Iterator[Batch]) -> Batch:
    """The next batch; bad input met in a loader process comes back inside that process's traceback."""
    try:
        return next(stream)
    except InputError as error:
        raise InputError(str(error).rpartition("InputError: ")[2]) from error
