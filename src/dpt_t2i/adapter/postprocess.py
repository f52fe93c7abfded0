"""From the grounding heads' output to ranked boxes in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.boxes import cxcywh_to_xyxy
from dpt_t2i.errors import InputError


@dataclass(frozen=True)
class RankedBoxes:
    """The boxes of one example, best first, on the CPU."""

    boxes: Tensor  # [Q_g, 4] xyxy in pixels of the given size, float32, not clipped to the image
    scores: Tensor  # [Q_g] in [0, 1], descending: probability of naming any object at all
    queries: Tensor  # [Q_g] long: which grounding query gave the box


def grounding_scores(logits: Tensor) -> Tensor:
    """`[..., K + 1]` token logits -> `[...]` float32: 1 - p(no object)."""
    return 1.0 - logits.float().softmax(dim=-1)[..., -1]


def rank_boxes(output: AdapterOutput, sizes: Sequence[tuple[int, int]]) -> list[RankedBoxes]:
    """Sort every example's boxes by score, equal scores by the box's own numbers, both descending.

    Args:
        output: of the adapter for B examples.
        sizes: `(width, height)` in pixels of each example's image, as the denoiser saw it.

    Raises:
        InputError: an example has a NaN or infinite score or box.
    """
    extent = torch.tensor([[width, height, width, height] for width, height in sizes], dtype=torch.float32)
    scores = grounding_scores(output.logits.detach()).cpu()
    boxes = cxcywh_to_xyxy(output.boxes.detach()).cpu() * extent[:, None]
    finite = scores.isfinite().all(dim=1) & boxes.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise InputError(f"grounding of example {int(finite.logical_not().nonzero()[0])} is NaN or infinite")
    return [_rank(*example) for example in zip(boxes, scores, strict=True)]


def _rank(boxes: Tensor, scores: Tensor) -> RankedBoxes:
    keys = list(zip(scores.tolist(), boxes.tolist(), strict=True))
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__, reverse=True), dtype=torch.long)
    return RankedBoxes(boxes=boxes[order], scores=scores[order], queries=order)
