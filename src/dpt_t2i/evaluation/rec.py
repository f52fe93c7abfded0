"""Referring expression comprehension: is the named thing among the adapter's best boxes? (method section 6)

The headline is Precision@k at IoU 0.5. MDETR's metric, which the release took over, thresholds the generalised IoU: it
is stricter, and stands beside it under its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpt_t2i.adapter.postprocess import rank_boxes
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.interface import Backbone, OnTruncate
from dpt_t2i.boxes import cxcywh_to_xyxy, giou_xyxy, iou_xyxy
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.examples import Chunk, EvalExample, chunks
from dpt_t2i.evaluation.itm import share
from dpt_t2i.sampling.scoring import MatchScorer

THRESHOLD = 0.5
AT = (1, 5, 10)
CORE = 0.2  # share of a box's sides around its centre that belongs to the thing, whatever its shape


@dataclass(frozen=True)
class RecRanks:
    """Where one example's first right box stands among the ranked ones, from 0; None: nowhere."""

    id: str
    timestep: int
    iou_rank: int | None
    giou_rank: int | None
    best_giou: float | None = None  # generalised IoU of the first box with the thing that it fits best


@torch.no_grad()
def rec_ranks(
    scorer: MatchScorer,
    examples: Iterable[EvalExample],
    timesteps: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int = 32,
    first: int = 0,
    on_truncate: OnTruncate = "warn",
) -> list[RecRanks]:
    """Read every example's noised image under its expression. Of several named things any one will do.

    Args:
        seed: of the noise; that of an example follows from (seed, its number).
        batch_size: examples at once; changes no rank.
        first: number of the first grounded example, where these are a part of all.
        on_truncate: what happens to an expression over the token limit.

    Raises:
        InputError: a box or its score is NaN or infinite (names the example).
    """
    rows = []
    for chunk in chunks(scorer.backbone, grounded(examples), batch_size, seed, first):
        text = scorer.backbone.encode_text([str(e.expression) for e in chunk.examples], on_truncate)
        for timestep in timesteps:
            output = scorer.read(*noised(scorer.backbone, chunk, timestep), text)
            rows.extend(ranks_of(output, chunk, timestep))
    return rows


def ranks_of(output: AdapterOutput, chunk: Chunk, timestep: int) -> list[RecRanks]:
    """The ranks of a chunk's grounded examples, which the adapter read under their expressions.

    Raises:
        InputError: a box or its score is NaN or infinite (names the example).
    """
    _refuse_nan(output, chunk.examples, timestep)
    ranked = rank_boxes(output, [(1, 1)] * len(chunk.examples))
    return [_ranks(example, timestep, one.boxes) for example, one in zip(chunk.examples, ranked, strict=True)]


@torch.no_grad()
def rec_oracle(
    backbone: Backbone,
    examples: Iterable[EvalExample],
    timesteps: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int = 32,
    first: int = 0,
) -> list[RecRanks]:
    """What the noise leaves for a reader that learned nothing: a matched filter told the true colour and box size.

    It decodes z_t / signal (the clean latent plus scaled noise, the very one that `rec_ranks` reads), slides a box of
    the true size over the picture and takes the place whose pixels lie nearest to the true colour. One box, so only
    Precision@1 has a meaning. Examples that name several things are left out.
    """
    rows = []
    for chunk in chunks(backbone, grounded(examples), batch_size, seed, first):
        for timestep in timesteps:
            noisy, steps = noised(backbone, chunk, timestep)
            signal = backbone.add_noise(torch.ones_like(noisy), torch.zeros_like(noisy), steps)
            pictures = backbone.decode_image(noisy / signal).clamp(-1, 1).float().cpu()
            for example, picture in zip(chunk.examples, pictures, strict=True):
                if example.boxes is not None and len(example.boxes) == 1:
                    guess = match_color(picture, core_color(example.pixels, example.boxes[0]), example.boxes[0, 2:])
                    rows.append(_ranks(example, timestep, guess[None]))
    return rows


def rec_summary(rows: Sequence[RecRanks], at: Sequence[int] = AT) -> dict[str, Any]:
    """By timestep: `precision@k` (IoU >= 0.5) and `giou_precision@k`, each `accuracy low high count` with a 95 %
    Wilson interval."""
    summary: dict[str, Any] = {}
    for timestep in dict.fromkeys(row.timestep for row in rows):
        mine = [row for row in rows if row.timestep == timestep]
        summary[str(timestep)] = {f"precision@{k}": share([_within(r.iou_rank, k) for r in mine]) for k in at} | {
            f"giou_precision@{k}": share([_within(r.giou_rank, k) for r in mine]) for k in at
        }
    return summary


def core_color(pixels: Tensor, box: Tensor) -> Tensor:
    """Mean colour `[3]` of the middle of a box (cxcywh in [0, 1]) of `[3, H, W]`; at least one pixel."""
    height, width = pixels.shape[1:]
    cx, cy, w, h = box.tolist()
    x0, x1 = int((cx - CORE * w / 2) * width), int((cx + CORE * w / 2) * width)
    y0, y1 = int((cy - CORE * h / 2) * height), int((cy + CORE * h / 2) * height)
    return pixels[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].mean(dim=(1, 2))


def match_color(picture: Tensor, color: Tensor, size: Tensor) -> Tensor:
    """The box `[4]` (xyxy in [0, 1]) of `size` (w, h in [0, 1]) whose pixels of `[3, H, W]` are nearest to `color`."""
    height, width = picture.shape[1:]
    w, h = max(1, round(float(size[0]) * width)), max(1, round(float(size[1]) * height))
    distance = (picture - color[:, None, None]).square().sum(dim=0)
    mean = F.avg_pool2d(distance[None, None], kernel_size=(h, w), stride=1)[0, 0]
    y, x = divmod(int(mean.argmin()), mean.shape[1])
    return torch.tensor([x / width, y / height, (x + w) / width, (y + h) / height])


def grounded(examples: Iterable[EvalExample]) -> Iterable[EvalExample]:
    """Those that have something to ground."""
    return (e for e in examples if e.expression is not None and e.boxes is not None and len(e.boxes))


def noised(backbone: Backbone, chunk: Chunk, timestep: int) -> tuple[Tensor, Tensor]:
    """z_t `[B, C, h, w]` of a chunk, and t `[B]`."""
    steps = torch.full((len(chunk.latents),), timestep, device=chunk.latents.device)
    return backbone.add_noise(chunk.latents, chunk.noise, steps), steps


def _ranks(example: EvalExample, timestep: int, boxes: Tensor) -> RecRanks:
    """`boxes`: [Q, 4] xyxy in [0, 1], best first."""
    assert example.boxes is not None
    targets = cxcywh_to_xyxy(example.boxes)
    giou = giou_xyxy(boxes, targets)
    return RecRanks(example.id, timestep, _first_hit(iou_xyxy(boxes, targets)), _first_hit(giou), float(giou[0].max()))


def _first_hit(overlaps: Tensor) -> int | None:
    hits = (overlaps >= THRESHOLD).any(dim=1).nonzero().flatten().tolist()
    return hits[0] if hits else None


def _within(rank: int | None, k: int) -> bool:
    return rank is not None and rank < k


def _refuse_nan(output: AdapterOutput, examples: Sequence[EvalExample], timestep: int) -> None:
    finite = output.logits.isfinite().flatten(1).all(dim=1) & output.boxes.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        name = examples[int((~finite).nonzero()[0])].id
        raise InputError(f"grounding of example `{name}` at timestep {timestep} is NaN or infinite; use dtype float32")
