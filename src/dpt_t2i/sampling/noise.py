"""Noise that depends on nothing but its seed: not on the device, the batch, or what was drawn before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seeded(seed: int) -> torch.Generator:
    """The generator of one image, on the CPU: its first draw is where the image starts, the next are the steps' noise,
    in the order of diffusers' pipelines."""
    return torch.Generator().manual_seed(seed)


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """The standard normal `shape` that the image of a seed starts from."""
    return torch.randn(tuple(shape), generator=seeded(seed))


def shared_noise(seed: int, draw: int, shape: Sequence[int]) -> Tensor:
    """The `draw`-th of a family of independent standard normals, the same for every image that is judged."""
    words = np.random.SeedSequence((seed, draw)).generate_state(2, np.uint32)
    mixed = int(words[0]) << 31 | int(words[1]) >> 1  # 63 bits: a generator takes a signed 64-bit seed
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(mixed))
