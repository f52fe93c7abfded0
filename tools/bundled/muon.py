"""Muon for a small U-Net on the CPU: matrices and kernels take an orthogonalised step, the rest AdamW's.

After Jordan et al., https://kellerjordan.github.io/posts/muon/ (Newton-Schulz coefficients), and Liu et al.,
https://arxiv.org/abs/2502.16982 (the step's size matches AdamW's: root mean square 0.2 of the rate).
`torch.optim.Muon` takes no kernels and computes in bfloat16, which is fifteen times slower on a CPU without that type.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, distributed, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST = 8  # a matrix with fewer rows or columns (first and last layer) is AdamW's


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to [N, m, n], roughly: singular values come to lie in 0.7 .. 1.2."""
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrices.shape[-2] <= matrices.shape[-1] else x.mT


class Muon:
    """One optimiser over a model: `step`, `zero_grad`, and a state that can be saved.

    With several processes each orthogonalises its share of the matrices; gradients must be averaged before.
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.95) -> None:
        self.matrices = [p for p in model.parameters() if p.ndim > 1 and min(p.flatten(1).shape) > SMALLEST]
        known = {id(p) for p in self.matrices}
        self.others = [p for p in model.parameters() if id(p) not in known]
        self.adamw = torch.optim.AdamW(self.others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.momentum, self.buffers = momentum, [torch.zeros_like(p) for p in self.matrices]

    def zero_grad(self) -> None:
        for p in (*self.matrices, *self.others):
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        gradients = [p.grad for p in self.matrices]
        torch._foreach_lerp_(self.buffers, gradients, 1 - self.momentum)
        nesterov = torch._foreach_lerp(gradients, self.buffers, self.momentum)
        torch._foreach_add_(self.matrices, self._updates(nesterov), alpha=-lr)

    def _updates(self, directions: list[Tensor]) -> list[Tensor]:
        shared = distributed.is_initialized()
        rank, world = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, direction in enumerate(directions):
            if index % world == rank:
                alike[tuple(direction.flatten(1).shape)].append(index)
        updates = [torch.zeros_like(d) for d in directions]
        for shape, indices in alike.items():
            found = orthogonalize(torch.stack([directions[i].flatten(1) for i in indices]))
            for i, update in zip(indices, found, strict=True):
                updates[i].copy_(update.view_as(updates[i]) * (0.2 * max(shape) ** 0.5))
        if shared:
            flat = torch.cat([u.flatten() for u in updates])
            distributed.all_reduce(flat)  # each update is zero everywhere but where it was computed
            parts = flat.split([u.numel() for u in updates])
            updates = [part.view_as(u) for part, u in zip(parts, updates, strict=True)]
        return updates

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "buffers": self.buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        for buffer, saved in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(saved)
