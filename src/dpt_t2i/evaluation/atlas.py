"""The layer x timestep atlas: what the adapter at each tap can tell at each noise level.

The figures are those of `itm_scores` and `rec_ranks`, on the same examples and noise; here one pass of the denoiser
serves all taps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log1p
from typing import Any

import torch

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.score import match_score
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.examples import HeldOut, chunks
from dpt_t2i.evaluation.itm import ItmScores, Pairs, itm_summary
from dpt_t2i.evaluation.rec import RecRanks, grounded, noised, ranks_of, rec_summary

SHARES = ("itm_text", "itm_image", "rec_p1")  # what a heat map shows


@dataclass(frozen=True)
class Bucket:
    """A part of the timesteps, from `low` to `high`, both in it; measured at `middle`."""

    low: int
    high: int
    middle: int


@dataclass(frozen=True)
class TapReaders:
    """An adapter a tap, all in eval mode, and the pass that feeds them."""

    backbone: Backbone
    taps: tuple[Tap, ...]
    adapters: Mapping[str, DiscriminativeAdapter]  # tap name -> its adapter


def buckets(low: int, high: int, count: int) -> tuple[Bucket, ...]:
    """The timesteps from `low` to `high` (both in) cut into `count` parts as equal as can be.

    Raises:
        InputError: there are fewer timesteps than parts.
    """
    span = high - low + 1
    if count > span:
        raise InputError(f"timestep_buckets {count}: there are {span} timesteps from {low} to {high}; give fewer")
    edges = [low + part * span // count for part in range(count + 1)]
    return tuple(Bucket(start, end - 1, (start + end) // 2) for start, end in zip(edges, edges[1:], strict=False))


@torch.no_grad()
def tap_scores(
    readers: TapReaders, examples: HeldOut, timesteps: Sequence[int], *, seed: int = 0, batch_size: int = 32
) -> Iterator[tuple[str, ItmScores]]:
    """`itm_scores` of every tap: (tap, scores of an example at a timestep)."""
    backbone = readers.backbone
    for chunk in chunks(backbone, examples, batch_size, seed, examples.first):
        pairs = Pairs.of(backbone, chunk, "ignore")  # what is cut is told while it is trained on
        for timestep in timesteps:
            noisy, steps = pairs.noised(backbone, timestep)
            features = backbone.features(noisy, steps, pairs.text, readers.taps)
            for tap, adapter in readers.adapters.items():
                scores = match_score(adapter.match_embeds(features), pairs.text.pooled)
                yield from ((tap, row) for row in pairs.judged(scores, timestep))


@torch.no_grad()
def tap_ranks(
    readers: TapReaders, examples: HeldOut, timesteps: Sequence[int], *, seed: int = 0, batch_size: int = 32
) -> Iterator[tuple[str, RecRanks]]:
    """`rec_ranks` of every tap: (tap, ranks of an example at a timestep)."""
    backbone = readers.backbone
    for chunk in chunks(backbone, grounded(examples), batch_size, seed, examples.first_grounded):
        text = backbone.encode_text([str(example.expression) for example in chunk.examples], "ignore")
        for timestep in timesteps:
            noisy, steps = noised(backbone, chunk, timestep)
            features = backbone.features(noisy, steps, text, readers.taps)
            for tap, adapter in readers.adapters.items():
                yield from ((tap, row) for row in ranks_of(adapter(features), chunk, timestep))


def atlas_cells(
    scores: Sequence[tuple[str, ItmScores]],
    ranks: Sequence[tuple[str, RecRanks]],
    logit_scales: Mapping[str, float],
) -> dict[str, dict[str, dict[str, Any]]]:
    """tap -> timestep (as text) -> figures; what no example has a source for is left out.

    `itm_text itm_image rec_p1 rec_p5 rec_p10`: each `accuracy low high count` with a 95 % Wilson interval. `loss_i2t
    loss_t2i`: cross entropy of the caption against its hard negative, and of the image. `loss_giou`: 1 - generalised
    IoU of the first box.

    Args:
        logit_scales: tap name -> the factor of its adapter's scores in the cross entropy.
    """
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for tap, scale in logit_scales.items():
        own_scores = [row for name, row in scores if name == tap]
        own_ranks = [row for name, row in ranks if name == tap]
        itm, rec = itm_summary(own_scores), rec_summary(own_ranks)
        cells[tap] = {}
        for timestep in dict.fromkeys([*itm, *rec]):
            cell = {f"itm_{side}": itm[timestep][side] for side in ("text", "image") if side in itm.get(timestep, {})}
            if timestep in rec:
                cell |= {f"rec_p{k}": rec[timestep][f"precision@{k}"] for k in (1, 5, 10)}
            cell |= _losses([row for row in own_scores if str(row.timestep) == timestep], scale)
            gious = [row.best_giou for row in own_ranks if str(row.timestep) == timestep and row.best_giou is not None]
            cells[tap][timestep] = cell | ({"loss_giou": 1.0 - sum(gious) / len(gious)} if gious else {})
    return cells


def best_cells(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Figure -> `tap timestep accuracy` of the cell where it is highest, the first of equals."""
    best: dict[str, dict[str, Any]] = {}
    for tap, row in cells.items():
        for timestep, cell in row.items():
            for name in SHARES:
                if name in cell and cell[name]["accuracy"] > best.get(name, {"accuracy": -1.0})["accuracy"]:
                    best[name] = {"tap": tap, "timestep": int(timestep), "accuracy": cell[name]["accuracy"]}
    return best


def _losses(rows: Sequence[ItmScores], scale: float) -> dict[str, float]:
    sides = {
        "loss_i2t": [row.positive - row.wrong_text for row in rows if row.wrong_text is not None],
        "loss_t2i": [row.positive - row.wrong_image for row in rows if row.wrong_image is not None],
    }
    return {
        name: sum(_two_way_entropy(scale * margin) for margin in margins) / len(margins)
        for name, margins in sides.items()
        if margins
    }


def _two_way_entropy(margin: float) -> float:
    """-log of the softmax's first of two, whose logits differ by `margin`, without overflow."""
    return max(-margin, 0.0) + log1p(exp(-abs(margin)))
