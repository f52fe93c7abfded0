"""The noising of flow-matching families (Liu et al., 2023): z_t = (1 - sigma) z_0 + sigma noise, sigma = t / 1000.

Timesteps are what the denoiser is conditioned on: floats from 0 (clean) to `num_train_timesteps` (noise). A scheduler's
shift says which of them a sampler visits, not what they mean, so it has no place in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.errors import InputError

FLOW = "flow_prediction"  # diffusers' name for a predicted velocity of the flow


@dataclass(frozen=True)
class FlowNoising:
    """All tensors `[B, C, h, w]`, timesteps `[B]`, whole or fractional."""

    num_train_timesteps: int
    prediction_type: str = FLOW

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        sigmas = self._sigmas(torch.as_tensor(timesteps, device=latents.device).reshape(-1))[:, None, None, None]
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity dz/dsigma, the same at every timestep."""
        return noise - latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio ((1 - sigma) / sigma)^2, `[B]`; infinite at timestep 0."""
        sigmas = self._sigmas(timesteps)
        return ((1 - sigmas) / sigmas) ** 2

    def _sigmas(self, timesteps: Tensor) -> Tensor:
        return timesteps.float() / self.num_train_timesteps


def flow_noising(scheduler: Any, name: str) -> FlowNoising:
    """Raises `InputError` where base `name`'s scheduler is not one of flow matching."""
    config = scheduler.config  # UniPC, DPM++ and DEIS sample flows too where they are told so
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == FLOW
    if not (type(scheduler).__name__.startswith("FlowMatch") or flows):
        raise InputError(f"base `{name}`: {type(scheduler).__name__} is no scheduler of flow matching")
    return FlowNoising(int(scheduler.config.num_train_timesteps))


def resolution_shift(config: Mapping[str, Any], height: int, width: int) -> float:
    """`mu` of a dynamically shifted schedule, linear in the image's tokens (diffusers' `calculate_shift`).

    Args:
        config: the scheduler's.
        height, width: of the image in tokens.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(least + (most - least) * (height * width - low) / (high - low))
