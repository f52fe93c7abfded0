"""Grounding: MDETR's set loss (Kamath et al., ICCV 2021) on the grounding queries."""

from __future__ import annotations

import torch
from torch import Tensor

from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.boxes import cxcywh_to_xyxy, giou_xyxy_elementwise
from dpt_t2i.objectives.matcher import Matching, match_queries
from dpt_t2i.objectives.types import GroundingTargets


def rec_losses(
    output: AdapterOutput,
    targets: GroundingTargets,
    num_boxes: float,
    *,
    eos_coef: float = 0.1,
    temperature: float = 0.07,
) -> dict[str, Tensor]:
    """Match queries to boxes, then score classes, boxes and alignment, in float32 also under autocast.

    Args:
        output: of the adapter for B (image, expression) pairs, with `token_align`.
        targets: of the B expressions, on the same device; examples without boxes add nothing.
        num_boxes: what the sums are divided by: target boxes over all processes / number of processes / micro-batches
            of the step; 0, where no example has a box, divides by 1.
        eos_coef: weight of the cross entropy of unmatched queries, whose target is "no object".
        temperature: of the alignment's softmaxes.

    Returns:
        `loss_ce`, `loss_bbox`, `loss_giou`, `loss_align`, each `[]` and differentiable even when there is no box; not
        finite where the predictions or boxes are not.

    Raises:
        ValueError: the adapter was called without text states.
    """
    if output.token_align is None:
        raise ValueError("rec_losses needs token_align: call the adapter with text_tokens")
    with torch.autocast(device_type=output.logits.device.type, enabled=False):
        matching = match_queries(output.logits, output.boxes, targets)
        token_rows = torch.cat(targets.positive_map).float()[matching.targets]  # [M, K + 1]
        sums = {
            "loss_ce": _soft_token_loss(output.logits.float(), matching, token_rows, targets, eos_coef),
            **_box_losses(output.boxes, matching, torch.cat(targets.boxes)),
            "loss_align": _alignment_loss(output, output.token_align.float(), matching, token_rows, temperature),
        }
    return {name: value / (num_boxes or 1.0) for name, value in sums.items()}


def _soft_token_loss(
    logits: Tensor, matching: Matching, token_rows: Tensor, targets: GroundingTargets, eos_coef: float
) -> Tensor:
    """Cross entropy with the tokens that name the box, or with "no object" at a lower weight."""
    target = torch.zeros_like(logits)
    target[..., -1] = 1.0
    target[matching.examples, matching.queries] = token_rows
    labelled = torch.tensor([len(boxes) > 0 for boxes in targets.boxes], device=logits.device)
    weight = torch.where(labelled, eos_coef, 0.0)[:, None].repeat(1, logits.shape[1])  # [B, Q]
    weight[matching.examples, matching.queries] = 1.0
    return -((logits.log_softmax(dim=-1) * target).sum(dim=-1) * weight).sum()


def _box_losses(boxes: Tensor, matching: Matching, target_boxes: Tensor) -> dict[str, Tensor]:
    predicted = boxes[matching.examples, matching.queries].float()  # [M, 4] cxcywh
    wanted = target_boxes[matching.targets].float()
    giou = giou_xyxy_elementwise(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return {"loss_bbox": (predicted - wanted).abs().sum(), "loss_giou": (1.0 - giou).sum()}


def _alignment_loss(
    output: AdapterOutput, tokens: Tensor, matching: Matching, token_rows: Tensor, temperature: float
) -> Tensor:
    """Contrast each matched query with all tokens and each named token with all queries (mean of both sums)."""
    logits = output.query_align.float() @ tokens.transpose(1, 2) / temperature  # [B, Q, L]
    length = min(tokens.shape[1], token_rows.shape[1] - 1)  # the last class, "no object", is no token
    positive = torch.zeros_like(logits, dtype=torch.bool)
    positive[matching.examples, matching.queries, :length] = token_rows[:, :length] > 0
    if output.token_mask is not None:
        padding = output.token_mask.to(logits.device).logical_not()[:, None]
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        positive = positive & ~padding
    return (_contrast(logits, positive, dim=2) + _contrast(logits, positive, dim=1)) / 2


def _contrast(logits: Tensor, positive: Tensor, dim: int) -> Tensor:
    """Sum over the rows along `dim` that have a positive of: logsumexp - mean of the positive logits."""
    count = positive.sum(dim=dim)
    mean_positive = logits.masked_fill(~positive, 0.0).sum(dim=dim) / count.clamp(min=1)
    return (logits.logsumexp(dim=dim) - mean_positive).masked_fill(count == 0, 0.0).sum()
