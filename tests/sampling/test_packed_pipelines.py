"""Families whose pipelines pack latents into tokens and count time in 0..1: FLUX's way, with a flow-matching sampler.

A toy in place of the transformer: it always sees the same noise, so that a shift of the state can be followed by hand.
"""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dpt_t2i.backbones.types import PipelineCall
from dpt_t2i.config import CorrectionConfig
from dpt_t2i.sampling.guide import Guide
from dpt_t2i.sampling.pipeline_hooks import DenoiserHook, StateCallback
from tests.sampling.stubs import NOISE, states

HEIGHT, WIDTH = 8, 4  # latent pixels, not square: packing must be told
SHIFT = torch.zeros(1, 4, HEIGHT, WIDTH)
SHIFT[0, 1, 2, 3] = 0.25


def pack(latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    tokens = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    batch, _, width_in = tokens.shape
    latents = tokens.reshape(batch, height // 2, width // 2, width_in // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, width_in // 4, height, width)


NOISE_TOKENS = pack(NOISE[..., :WIDTH])


class Velocity(nn.Module):
    """v = NOISE - z_0, from z = (1 - sigma) z_0 + sigma NOISE; `timestep` is sigma."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return (NOISE_TOKENS - hidden_states) / (1 - timestep).clamp(min=1e-2)[:, None, None]


class PushAlong:
    adapter = nn.Identity()

    def __init__(self) -> None:
        self.timesteps: list[float] = []

    def __call__(self, z: Tensor, t: Tensor, text: object) -> Tensor:
        assert z.shape[1:] == SHIFT.shape[1:]
        self.timesteps += t.tolist()
        return (z * SHIFT).flatten(1).sum(1)


def sampled(pipeline: SimpleNamespace, callback: StateCallback | None = None) -> Tensor:
    """As FLUX's pipeline goes through its steps."""
    pipeline.scheduler.set_timesteps(pipeline.num_timesteps)
    latents = pack(torch.randn(2, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for index, timestep in enumerate(pipeline.scheduler.timesteps):
            velocity = pipeline.transformer(hidden_states=latents, timestep=timestep.expand(2) / 1000)
            latents = pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback is not None:
                latents = callback(pipeline, index, timestep, {"latents": latents})["latents"]
    return latents


@pytest.mark.parametrize("how", ["hook", "callback"])
def test_a_shift_of_the_map_reaches_the_final_tokens(how):
    pipeline = SimpleNamespace(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=Velocity(), num_timesteps=8
    )
    backbone = SimpleNamespace(
        pipeline=pipeline,
        denoiser=pipeline.transformer,
        pipeline_call=PipelineCall(1000.0, unpack, pack),
        latent_channels=4,
    )
    config = CorrectionConfig(correct=1.0, correction_start=0.5, correction_end=0.6)
    scorer = PushAlong()
    guide = Guide(backbone, scorer, config, states(2), (HEIGHT, WIDTH), 2)
    plain = sampled(pipeline)
    if how == "hook":
        with DenoiserHook(guide).installed():
            moved = sampled(pipeline)
    else:
        moved = sampled(pipeline, StateCallback(guide))
    timestep, sigma = float(pipeline.scheduler.timesteps[4]), float(pipeline.scheduler.sigmas[4])
    assert scorer.timesteps == pytest.approx([timestep] * 2)
    expected = (SHIFT / (1 - sigma)).expand(2, -1, -1, -1)
    torch.testing.assert_close(unpack(moved - plain, HEIGHT, WIDTH), expected, rtol=2e-3, atol=2e-3)
