"""What the losses are told and what they tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroundingTargets:
    """The boxes that B expressions refer to. An example with no box (n_i = 0) is masked: it adds to no loss."""

    boxes: tuple[Tensor, ...]  # B tensors [n_i, 4], cxcywh in [0, 1]
    positive_map: tuple[Tensor, ...]  # B tensors [n_i, K + 1]; rows sum to 1 over the tokens that name the box

    def __len__(self) -> int:
        return len(self.boxes)

    def num_boxes(self) -> int:
        """Boxes of the whole batch; sum over processes, then divide by their number, to normalise `rec_losses`."""
        return sum(len(boxes) for boxes in self.boxes)

    def repeated(self, times: int) -> GroundingTargets:
        """The batch, `times` over: what as many adapters are asked for at once."""
        return GroundingTargets(boxes=self.boxes * times, positive_map=self.positive_map * times)

    def to(self, device: torch.device) -> GroundingTargets:
        return GroundingTargets(
            boxes=tuple(boxes.to(device) for boxes in self.boxes),
            positive_map=tuple(rows.to(device) for rows in self.positive_map),
        )


@dataclass(frozen=True)
class Losses:
    """Named unweighted losses of a step and the weights that add them up."""

    terms: Mapping[str, Tensor]  # name, as `loss_i2t` -> [] float32
    weights: Mapping[str, float]  # the same names, more are allowed

    @property
    def total(self) -> Tensor:
        """`[]` weighted sum of the terms: the column `loss` of the metrics."""
        return torch.stack([self.weights[name] * term for name, term in self.terms.items()]).sum()
