"""The sampling loop: a diffusers scheduler, classifier-free guidance, and self-correction inside.

z_t is always the denoiser's input. Samplers that keep their latents at another scale get the corrected state mapped
back, so that DDIM and Euler agree on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import GUIDANCE, TextStates
from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.correct import Scorer, correct
from dpt_t2i.sampling.schedulers import initial_scale, input_scale, make_scheduler, model_input, shift_memory


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after each step."""

    index: int  # 0..steps-1
    timestep: float
    latents: Tensor  # [B, C, h, w] the sampler's latents after the step
    scores: Tensor | None  # [B] of the uncorrected z_t, None where the step was not corrected


@torch.no_grad()
def sample(
    backbone: Backbone,
    text: TextStates,
    null: TextStates,
    initial_latents: Tensor,
    settings: SampleConfig,
    correction: CorrectionConfig,
    scorer: Scorer | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Final latents `[B, C, h, w]` float32, ready for `decode_image`.

    Args:
        text, null: B texts of the conditional and of the unconditional branch.
        initial_latents: standard normal `[B, C, h, w]`.
        scorer: judges z_t; needed if `correction.correct` > 0.

    Raises:
        InputError: correction without a scorer or under `torch.inference_mode`, or its gradient is not finite.
    """
    if correction.correct > 0 and scorer is None:
        raise InputError("self-correction (`correct` > 0) needs an adapter; give `adapter`, or set `correct` to 0")
    height, width = initial_latents.shape[-2:]
    scheduler = make_scheduler(backbone, settings.scheduler, settings.steps, (height, width))
    latents = initial_latents.to(backbone.device, torch.float32) * initial_scale(scheduler)
    for index, timestep in enumerate(scheduler.timesteps):
        z = model_input(scheduler, latents, timestep)
        z_cond, scores = z, None
        if scorer is not None and is_corrected(index, len(scheduler.timesteps), correction):
            z_cond, scores = _corrected(z, timestep, text, scorer, correction)
            if correction.correction_mode == "state":
                latents = _move_state(scheduler, latents, z_cond, timestep)
                z = z_cond
        prediction = _guided(backbone, z, z_cond, timestep, text, null, settings.guidance_scale)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(Step(index, float(timestep), latents, scores))
    return latents


def is_corrected(index: int, steps: int, correction: CorrectionConfig) -> bool:
    """Is step `index` of `steps` inside the corrected part of the schedule, and one of every k-th?"""
    inside = correction.correction_start <= index / steps < correction.correction_end
    return correction.correct > 0 and inside and index % correction.correction_every == 0


def _corrected(
    z: Tensor, timestep: Tensor, text: TextStates, scorer: Scorer, correction: CorrectionConfig
) -> tuple[Tensor, Tensor]:
    return correct(
        z,
        timestep.expand(len(z)),
        text,
        score=scorer,
        strength=correction.correct,
        rule=correction.correction_rule,
    )


def _move_state(scheduler: Any, latents: Tensor, corrected: Tensor, timestep: Tensor) -> Tensor:
    """The sampler's latents whose denoiser input is `corrected`; its memory moves along."""
    moved = corrected / input_scale(scheduler, timestep)
    shift_memory(scheduler, moved - latents)
    return moved


def _guided(
    backbone: Backbone,
    z: Tensor,
    z_cond: Tensor,
    timestep: Tensor,
    text: TextStates,
    null: TextStates,
    guidance_scale: float,
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022); at scale 1 the unconditional branch is not computed.

    Where guidance is distilled into the denoiser, the scale is one of its inputs and there is one branch.
    """
    if GUIDANCE in text.extras:
        text = replace(text, extras={**text.extras, GUIDANCE: torch.full((len(z),), guidance_scale, device=z.device)})
        return backbone.predict(z_cond, timestep.expand(len(z)), text)[0]
    if guidance_scale == 1:
        return backbone.predict(z_cond, timestep.expand(len(z)), text)[0]
    both = torch.cat([z, z_cond])
    prediction, _ = backbone.predict(both, timestep.expand(len(both)), TextStates.cat([null, text]))
    unconditional, conditional = prediction.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
