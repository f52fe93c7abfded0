"""What the discriminative evaluations read: one fixed view of each record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.data.examples import hard_captions
from dpt_t2i.data.perturb import perturb
from dpt_t2i.data.records import Expression, Record
from dpt_t2i.data.transforms import fit_square, to_pixels
from dpt_t2i.sampling.noise import shared_noise


@dataclass(frozen=True)
class EvalExample:
    """One held-out example; pixels are float32 `[3, S, S]` in [-1, 1]."""

    id: str
    pixels: Tensor
    caption: str
    hard_pixels: Tensor | None = None  # an image of which the hard caption is true and the caption is not
    hard_caption: str | None = None
    rule: str = "unknown"  # how the hard caption was made
    expression: str | None = None  # a text that names the boxes
    boxes: Tensor | None = None  # [n, 4] cxcywh in [0, 1]


@dataclass(frozen=True)
class Chunk:
    """Consecutive examples with their latents and noise."""

    examples: Sequence[EvalExample]
    latents: Tensor  # [B, C, h, w] clean, the posterior's mean
    noise: Tensor  # [B, C, h, w]


def examples_of(records: Sequence[Record], resolution: int) -> Iterator[EvalExample]:
    """The first caption and negative of every record, and its first expression that names one thing alone.

    A record without any negative gets a caption by rule, as in training, always the same; where no rule applies it has
    none, nor where a picture is its negative, of which the made caption need not be true. A record whose expressions
    all name several things gives the first of them.
    """
    for record in records:
        expression = _expression_of(record)
        picture, keep = record.load_image(), expression.boxes if expression else ()
        record.require_inside(keep, picture.size)
        square, boxes = fit_square(picture, keep, resolution)
        hard = record.load_negative_image()
        negative = next(iter(hard_captions(record, record.captions[0], perturb)), None)
        yield EvalExample(
            id=f"{record.source}/{record.id}",
            pixels=to_pixels(square),
            caption=record.captions[0],
            hard_pixels=None if hard is None else to_pixels(fit_square(hard, (), resolution)[0]),
            hard_caption=negative.caption if negative else None,
            rule=negative.rule if negative else "unknown",
            expression=expression.text if expression else None,
            boxes=boxes if expression else None,
        )


def each_expression(records: Iterable[Record]) -> Iterator[Record]:
    """Every record once for each of its expressions, with that one alone."""
    for record in records:
        for number, expression in enumerate(record.expressions):
            yield replace(record, id=f"{record.id}#{number}", expressions=(expression,))


@dataclass(frozen=True)
class HeldOut:
    """A part of the held-out examples, streamed: a picture is opened when its turn comes, each time anew."""

    records: Sequence[Record]  # all
    resolution: int
    part: range  # positions of this process's records

    def __iter__(self) -> Iterator[EvalExample]:
        return examples_of(self.records[self.part.start : self.part.stop], self.resolution)

    @property
    def first(self) -> int:
        """Number of the first example of the part among all."""
        return self.part.start

    @property
    def first_grounded(self) -> int:
        """Number of the first example of the part among all that have something to ground."""
        return sum(_is_grounded(record) for record in self.records[: self.part.start])


def _expression_of(record: Record) -> Expression | None:
    return next((e for e in record.expressions if len(e.boxes) == 1), next(iter(record.expressions), None))


def _is_grounded(record: Record) -> bool:
    expression = _expression_of(record)
    return expression is not None and len(expression.boxes) > 0


def chunks(
    backbone: Backbone, examples: Iterable[EvalExample], batch_size: int, seed: int, first: int = 0
) -> Iterator[Chunk]:
    """Encode examples in groups. The noise of an example follows from (seed, its number), whatever the group size.

    Args:
        first: number of the first example, where these are a part of all.
    """
    remaining, start = iter(examples), first
    while group := list(islice(remaining, batch_size)):
        latents = backbone.encode_image(torch.stack([e.pixels for e in group]).to(backbone.device))
        noise = torch.stack([shared_noise(seed, start + i, latents.shape[1:]) for i in range(len(group))])
        yield Chunk(group, latents, noise.to(latents))
        start += len(group)
