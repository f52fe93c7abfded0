"""Where a feature is in the map, and how noised the image was."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_PERIOD = 10_000.0


def sine_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """DETR's two-dimensional sine embedding, `[height * width, dim]` float32 (models/position_encoding.py of
    facebookresearch/detr, `normalize=True`).

    The first half of the channels encodes the row, the second the column, each scaled to (0, 2 pi] over the map,
    so that a position means the same share of the image whatever the map's size. Every sine-cosine pair has length 1:
    beside features of unit scale, positions are neither drowned nor deafening. `dim` must be a multiple of 4.
    """
    channels = torch.arange(dim // 2, dtype=torch.float32, device=device)
    periods = MAX_PERIOD ** (2 * torch.div(channels, 2, rounding_mode="floor") / (dim // 2))
    rows, columns = (_sine_of_index(size, periods) for size in (height, width))  # [h, dim/2], [w, dim/2]
    grid = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1)
    return grid.flatten(0, 1)


def _sine_of_index(size: int, periods: Tensor) -> Tensor:
    index = torch.arange(1, size + 1, dtype=torch.float32, device=periods.device)  # DETR counts from 1
    angles = (index / (size + 1e-6) * 2 * math.pi)[:, None] / periods
    return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=-1).flatten(1)


def sine_timesteps(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of timesteps `[B]` -> `[B, dim]` float32: cosines, then sines, as the denoiser's own time embedding.

    Timesteps may be fractional: flow-matching schedulers count 0..1000 in floats.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEncoding(nn.Module):
    """Learned embedding of the timestep: sinusoids, then `d -> 4d -> d` with SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear_in = nn.Linear(dim, 4 * dim)
        self.linear_out = nn.Linear(4 * dim, dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """`[B]` -> `[B, dim]`."""
        sinusoids = sine_timesteps(timesteps, self.dim).to(self.linear_in.weight.dtype)
        embedding: Tensor = self.linear_out(F.silu(self.linear_in(sinusoids)))
        return embedding
