"""Dropout whose mask costs little on a CPU: four elements of it from one random integer, kept as a byte each.

PyTorch's own draws a double for each element there, one after another: a tenth of a stage-1 step with the default
adapter. On other devices PyTorch's own is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEVELS = 1 << 16  # a 16-bit part of an integer decides on an element


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """As `F.dropout`: in training an element becomes 0 with probability `p`, the others grow so that the mean stays.

    On a CPU `p` is rounded to a multiple of 2^-16, for the growth too. Masks follow `torch.manual_seed`, but are other
    ones than those of `F.dropout`.
    """
    if x.device.type != "cpu" or not training or not 0 < p < 1:
        return F.dropout(x, p, training)
    dropped = min(max(round(p * LEVELS), 1), LEVELS - 1)
    integers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    kept = integers.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - LEVELS // 2
    result: Tensor = _Scaled.apply(x, kept, LEVELS / (LEVELS - dropped))
    return result


class _Scaled(torch.autograd.Function):
    """x * kept * scale, and the same of its gradient, for which only `kept` is held: one new tensor each, not three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return kept.to(x.dtype).mul_(x).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return kept.to(grad.dtype).mul_(grad).mul_(ctx.scale), None, None


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)
