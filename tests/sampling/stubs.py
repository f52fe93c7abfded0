"""A backbone and a scorer small enough to be solved on paper."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dpt_t2i.backbones.types import Features, Tap, TextStates

NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="leading",
    )


class ConstantNoise:
    """A denoiser that always sees the same noise, so that z_t = a z_0 + s NOISE exactly, in every sampler."""

    prediction_type = "epsilon"
    guidance_scale = 7.5
    guidance_interval = (0.0, 1.0)
    eta = 0.0

    def __init__(self) -> None:
        self.pipeline = SimpleNamespace(scheduler=scheduler())
        self.device = torch.device("cpu")
        self.seen: list[Tensor] = []  # every z that the denoiser was given

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: TextStates, taps: Sequence[Tap] = ()
    ) -> tuple[Tensor, Features]:
        self.seen.append(noisy)
        return NOISE.expand_as(noisy), Features({}, timesteps)


def states(batch: int) -> TextStates:
    return TextStates(torch.zeros(batch, 2, 3), torch.zeros(batch, 3), torch.ones(batch, 2, dtype=torch.bool))
