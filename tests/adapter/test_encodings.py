"""Sine positions and timesteps, against their defining formulas."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from dpt_t2i.adapter.encodings import TimestepEncoding, sine_positions, sine_timesteps

CPU = torch.device("cpu")


def test_positions_are_row_then_column_scaled_to_the_map() -> None:
    height, width, dim = 2, 3, 8
    grid = sine_positions(height, width, dim, CPU).unflatten(0, (height, width))
    row, column = 1, 0
    y, x = 2 * math.pi * (row + 1) / height, 2 * math.pi * (column + 1) / width
    expected = [f(angle / period) for angle in (y, x) for period in (1, 100) for f in (math.sin, math.cos)]
    assert grid[row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_every_place_has_the_same_unit_scale() -> None:
    grid = sine_positions(5, 7, 64, CPU)
    torch.testing.assert_close(grid.square().mean(dim=1), torch.full((35,), 0.5))
    assert len(grid.unique(dim=0)) == 35


def test_last_place_does_not_depend_on_the_map_size() -> None:
    torch.testing.assert_close(sine_positions(4, 4, 16, CPU)[-1], sine_positions(12, 9, 16, CPU)[-1], atol=1e-4, rtol=0)


def test_timesteps_are_those_of_the_denoiser() -> None:
    timesteps = torch.tensor([0, 37, 500, 999])
    expected = get_timestep_embedding(timesteps, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sine_timesteps(timesteps, 32), expected)


def test_fractional_timesteps_lie_between_their_neighbours() -> None:
    torch.manual_seed(0)
    low, middle, high = TimestepEncoding(16)(torch.tensor([500.0, 500.25, 501.0]))
    assert 0 < (middle - low).norm() < (high - low).norm()
