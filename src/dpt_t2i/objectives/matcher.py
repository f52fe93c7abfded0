"""Which query answers for which box: Hungarian matching (DETR, with MDETR's soft-token class cost)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dpt_t2i.boxes import cxcywh_to_xyxy, giou_xyxy_elementwise
from dpt_t2i.objectives.types import GroundingTargets

COST_CLASS = 1.0
COST_L1 = 5.0
COST_GIOU = 2.0
BROKEN = -1e9  # cost of a pair that is NaN or infinite: it is matched first, so that the losses are not finite either


@dataclass(frozen=True)
class Matching:
    """M matched pairs of the whole batch, on the device of the predictions, by example and then by query."""

    examples: Tensor  # [M] long, example of the batch
    queries: Tensor  # [M] long, grounding query of that example
    targets: Tensor  # [M] long, row of the batch's concatenated targets


@torch.no_grad()
def match_queries(logits: Tensor, boxes: Tensor, targets: GroundingTargets) -> Matching:
    """Assign to every target box its own query of the same example, at the least total cost.

    Cost of a pair: -(share of p(token) on the box's tokens) + 5 L1 - 2 GIoU. Where an example has more boxes than
    queries, the cheapest Q pairs are made. A cost that is NaN or infinite is no error here: its pair is matched, so
    that the loss tells, which all processes see in the same step.

    Args:
        logits: `[B, Q, K + 1]`.
        boxes: `[B, Q, 4]` cxcywh in [0, 1].
        targets: of the B examples, on the device of the predictions.
    """
    counts = [len(rows) for rows in targets.boxes]
    example_of_target = torch.arange(len(targets)).repeat_interleave(torch.tensor(counts, dtype=torch.long))
    # One transfer of the whole batch; the assignments themselves are a CPU affair.
    cost = pairwise_cost(logits, boxes, targets, example_of_target.to(logits.device)).cpu()  # [N, Q]
    cost = cost.nan_to_num(nan=BROKEN, posinf=BROKEN, neginf=BROKEN)
    queries, chosen = [], []
    offset = 0
    for block in cost.split(counts):
        query, target = linear_sum_assignment(block.T.numpy())
        queries.append(torch.as_tensor(query, dtype=torch.long))
        chosen.append(torch.as_tensor(target, dtype=torch.long) + offset)
        offset += len(block)
    matched = torch.cat(chosen)
    pairs = torch.stack((example_of_target[matched], torch.cat(queries), matched)).to(logits.device)
    return Matching(examples=pairs[0], queries=pairs[1], targets=pairs[2])


def pairwise_cost(logits: Tensor, boxes: Tensor, targets: GroundingTargets, example_of_target: Tensor) -> Tensor:
    """Cost of every target with every query of its own example -> `[N, Q]` float32, N targets in the batch."""
    probabilities = logits.float().softmax(dim=-1)[example_of_target]  # [N, Q, K + 1]
    token_rows = torch.cat(targets.positive_map).float()  # [N, K + 1]
    cost_class = -(probabilities * token_rows[:, None]).sum(dim=-1)
    predicted, wanted = boxes.float()[example_of_target], torch.cat(targets.boxes).float()[:, None]  # [N, Q | 1, 4]
    cost_l1 = (predicted - wanted).abs().sum(dim=-1)
    cost_giou = -giou_xyxy_elementwise(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return COST_CLASS * cost_class + COST_L1 * cost_l1 + COST_GIOU * cost_giou
