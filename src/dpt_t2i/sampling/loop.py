"""The sampling loop: a diffusers scheduler, classifier-free guidance, and self-correction inside.

z_t is always the denoiser's input. Samplers that keep their latents at another scale get the corrected state mapped
back, so that DDIM and Euler agree on it.

A fused correction takes the gradient from the pass that predicts the noise, and gives its shift to the next latent:
the state is moved one step late, by the same amount of z, and the extra pass up to the tap is saved. The unconditional
branch needs no gradient: where its arithmetic is what costs, it goes first and alone, which halves the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora import lora_disabled
from dpt_t2i.backbones.types import GUIDANCE, TextStates
from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.correct import PredictingScorer, Scorer, correct, predict_and_correct
from dpt_t2i.sampling.schedulers import initial_scale, make_scheduler, model_input, move_state

# Places of a latent from which a fused step runs its branches one after the other. Below, a pass of one row costs
# nearly what one of two does: 0.74 of it at 16 x 16 (bundled), 0.53 at 32 x 32 (a U-Net of 64, 128, 256, 256).
APART_FROM = 32 * 32


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
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Final latents `[B, C, h, w]` float32, ready for `decode_image`.

    Args:
        text, null: B texts of the conditional and of the unconditional branch.
        initial_latents: standard normal `[B, C, h, w]`.
        scorer: judges z_t; needed if `correction.correct` > 0, and a `PredictingScorer` if the correction is fused.
        generators: B of them, one an image, for the noise of the steps; needed if `eta_of` is above 0.

    Raises:
        InputError: `eta` with another sampler than DDIM; a guided part that ends before it begins or holds no step,
            or any where guidance is an input of the denoiser; numbers of latents, prompts and negative prompts that
            differ; correction of no step, without a scorer or under `torch.inference_mode`, its gradient is not finite,
            or it is fused in mode `noise` or with `lora_draws` off.
    """
    check_correction(correction, settings)
    _check_scorer(correction, scorer)
    if not len(initial_latents) == len(text) == len(null):
        raise InputError(
            f"{len(initial_latents)} latents, {len(text)} prompts and {len(null)} negative prompts do not go together; "
            "give as many of each"
        )
    height, width = initial_latents.shape[-2:]
    scheduler = make_scheduler(backbone, settings.scheduler, settings.steps, (height, width))
    latents = initial_latents.to(backbone.device, torch.float32) * initial_scale(scheduler)
    noising = _noising(scheduler, eta_of(backbone, settings), generators)
    told, scales = _scales(text, len(scheduler.timesteps), backbone, settings)
    steps, fused = len(scheduler.timesteps), correction.correction_fused
    shift: Tensor | None = None  # [B, C, h, w] of z, found by a fused correction in the step before
    for index, timestep in enumerate(scheduler.timesteps):
        wanted, scale = is_corrected(index, steps, correction), scales[index]
        z = model_input(scheduler, latents, timestep)
        z_state, z_cond, scores = z, z, None  # what the sampler steps from, and what the conditional branch sees
        if shift is not None:
            z_state = z_cond = z + shift
        elif wanted and not fused:
            z_cond, scores = _corrected(z, timestep, text, scorer, correction)
            z_state = z_cond if correction.correction_mode == "state" else z
        if z_state is not z:
            latents = move_state(scheduler, latents, z_state, timestep)
        if wanted and fused:
            prediction, shift, scores = _fused(backbone, z_state, timestep, told, null, scale, scorer, correction)
        else:
            with nullcontext() if settings.lora_draws else lora_disabled(backbone):
                prediction, shift = _guided(backbone, z_state, z_cond, timestep, told, null, scale), None
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **noising)[0]
        if on_step is not None:
            on_step(Step(index, float(timestep), latents, scores))
    return latents


def guidance_of(backbone: Backbone, settings: SampleConfig) -> float:
    """The scale that was asked for, else the base's own."""
    return backbone.guidance_scale if settings.guidance_scale is None else settings.guidance_scale


def guidance_interval_of(backbone: Backbone, settings: SampleConfig) -> tuple[float, float]:
    """The guided part of the schedule `[start, end)` that was asked for, else the base's own."""
    start, end = backbone.guidance_interval
    return (
        start if settings.guidance_start is None else settings.guidance_start,
        end if settings.guidance_end is None else settings.guidance_end,
    )


def eta_of(backbone: Backbone, settings: SampleConfig) -> float:
    """The share of fresh noise that was asked for, else the base's own, which is meant for DDIM."""
    if settings.eta is not None:
        return settings.eta
    return backbone.eta if settings.scheduler == "ddim" else 0.0


def is_corrected(index: int, steps: int, correction: CorrectionConfig) -> bool:
    """Is step `index` of `steps` inside the corrected part of the schedule, and one of every k-th?

    A fused correction of the last step would have no latent left to move.
    """
    inside = correction.correction_start <= index / steps < correction.correction_end
    moves = not correction.correction_fused or index + 1 < steps
    return correction.correct > 0 and inside and moves and index % correction.correction_every == 0


def check_correction(correction: CorrectionConfig, settings: SampleConfig) -> None:
    """Refuse what no model could do.

    Raises:
        InputError: as `check_corrected_steps`, or the correction is fused in mode `noise` or with `lora_draws` off.
    """
    check_corrected_steps(correction, settings.steps)
    if correction.correct == 0 or not correction.correction_fused:
        return
    if correction.correction_mode != "state":
        raise InputError(
            "`correction_fused` moves the next latent and needs `correction_mode` state; mode noise changes the very "
            "prediction that a fused gradient comes from"
        )
    if not settings.lora_draws:
        raise InputError(
            "`correction_fused` reads score and prediction off one pass, of which with `lora_draws` off only the score "
            "sees the LoRA; leave correction_fused out"
        )


def check_corrected_part(correction: CorrectionConfig) -> None:
    """Refuse a corrected part of the schedule that ends before it begins."""
    if correction.correct > 0 and correction.correction_start >= correction.correction_end:
        raise InputError(
            f"correction_start {correction.correction_start:g} is not before correction_end "
            f"{correction.correction_end:g}: no step would be corrected; exchange them, or set `correct` to 0"
        )


def check_corrected_steps(correction: CorrectionConfig, steps: int, first: int = 0) -> None:
    """Refuse a correction of none of the steps `first`..`steps` - 1.

    Raises:
        InputError: that; or the corrected part of the schedule ends before it begins.
    """
    check_corrected_part(correction)
    if correction.correct > 0 and not any(is_corrected(index, steps, correction) for index in range(first, steps)):
        but = " (fused: it moves the latent of the step after, and the last has none)"
        but = but if correction.correction_fused else " (a callback fires after the first)" if first else ""
        raise InputError(
            f"of {steps} steps none is corrected between {correction.correction_start:g} and "
            f"{correction.correction_end:g}{but}; widen that part, or set `correct` to 0"
        )


def _noising(scheduler: Any, eta: float, generators: Sequence[torch.Generator] | None) -> dict[str, Any]:
    """What DDIM's steps are told of fresh noise (its `eta`; Song et al., 2021, eq. 16): nothing where there is none."""
    if eta == 0:
        return {}
    if type(scheduler).__name__ != "DDIMScheduler":
        raise InputError(
            f"`eta` {eta:g} is DDIM's, and this samples by {type(scheduler).__name__}; set `eta` to 0, or "
            "`scheduler` to ddim on a model that is not flow matching"
        )
    if generators is None:
        raise ValueError("`eta` > 0 needs a generator for each image")
    return {"eta": eta, "generator": list(generators)}


def _check_scorer(correction: CorrectionConfig, scorer: Scorer | None) -> None:
    if correction.correct == 0:
        return
    if scorer is None:
        raise InputError("self-correction (`correct` > 0) needs an adapter; give `adapter`, or set `correct` to 0")
    if correction.correction_fused and not isinstance(scorer, PredictingScorer):
        raise InputError(
            "`correction_fused` reads the score off the denoiser's own prediction, which a plain function cannot; give "
            "a `MatchScorer`, or leave correction_fused out"
        )


def _corrected(
    z: Tensor, timestep: Tensor, text: TextStates, scorer: Scorer | None, correction: CorrectionConfig
) -> tuple[Tensor, Tensor]:
    """z^_t and the scores of z_t, by a pass of its own up to the tap."""
    assert scorer is not None
    strength, rule = correction.correct, correction.correction_rule
    return correct(z, timestep.expand(len(z)), text, score=scorer, strength=strength, rule=rule)


def _scales(text: TextStates, steps: int, backbone: Backbone, settings: SampleConfig) -> tuple[TextStates, list[float]]:
    """What the conditional branch is told, and the scale of each step: 1 outside the guided part of the schedule
    (Kynkaanniemi et al., 2024, "Applying guidance in a limited interval"), and where less than 1 was asked for.

    Where guidance is distilled into the denoiser, the scale is one of its inputs and there is one branch.
    """
    scale, (start, end) = guidance_of(backbone, settings), guidance_interval_of(backbone, settings)
    if start > end:
        raise InputError(f"guidance_start {start:g} lies behind guidance_end {end:g}; exchange them")
    if GUIDANCE not in text.extras:
        scale = max(scale, 1.0)  # at 0, which models distilled to few steps are given, diffusers does not guide either
        guided = [start <= index / steps < end for index in range(steps)]
        if scale != 1 and not any(guided):
            raise InputError(
                f"of {steps} steps none is guided between {start:g} and {end:g}; widen that part (guidance_start, "
                "guidance_end), or set guidance_scale to 1"
            )
        return text, [scale if inside else 1.0 for inside in guided]
    if (start, end) != (0.0, 1.0):
        raise InputError(
            "guidance is an input of this denoiser at every step; leave guidance_start and guidance_end out"
        )
    scales = torch.full((len(text),), scale, device=text.tokens.device)
    return replace(text, extras={**text.extras, GUIDANCE: scales}), [1.0] * steps


def _fused(
    backbone: Backbone,
    z: Tensor,
    timestep: Tensor,
    text: TextStates,
    null: TextStates,
    guidance_scale: float,
    scorer: Scorer | None,
    correction: CorrectionConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """The guided prediction at z_t, the shift z^_t - z_t that the next latent gets, and the scores of z_t."""
    assert isinstance(scorer, PredictingScorer)
    timesteps, guided = timestep.expand(len(z)), guidance_scale != 1
    apart = guided and z.shape[-2] * z.shape[-1] >= APART_FROM
    first = [backbone.predict(z, timesteps, null)[0]] if apart else []
    predictions, moved, scores = predict_and_correct(
        z,
        timesteps,
        text,
        null if guided and not apart else None,
        scorer=scorer,
        strength=correction.correct,
        rule=correction.correction_rule,
    )
    both = torch.cat([*first, predictions])
    return _combine(both, guidance_scale) if guided else both, moved - z, scores


def _guided(
    backbone: Backbone,
    z: Tensor,
    z_cond: Tensor,
    timestep: Tensor,
    text: TextStates,
    null: TextStates,
    guidance_scale: float,
) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022); at scale 1 the unconditional branch is not computed."""
    if guidance_scale == 1:
        return backbone.predict(z_cond, timestep.expand(len(z)), text)[0]
    both = torch.cat([z, z_cond])
    prediction, _ = backbone.predict(both, timestep.expand(len(both)), TextStates.cat([null, text]))
    return _combine(prediction, guidance_scale)


def _combine(predictions: Tensor, guidance_scale: float) -> Tensor:
    """`[2B, C, h, w]`, the unconditional ones first -> `[B, C, h, w]`."""
    unconditional, conditional = predictions.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
