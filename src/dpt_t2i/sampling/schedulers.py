"""Samplers from diffusers, made from the pipeline's own noise schedule, and how a correction enters their state."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dpt_t2i.backbones.flow_noising import FLOW
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.errors import InputError

FLOW_SAMPLERS = ("ddim", "euler")  # on the straight path of flow matching the two take the very same step
# Samplers through which a shift of the state is tested to reach the final latent.
STATE_SAMPLERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


class FlowSchedule(Protocol):
    """What a flow-matching family has beside `Backbone`."""

    def schedule(self, steps: int, height: int, width: int) -> dict[str, Any]: ...


def make_scheduler(backbone: Backbone, name: str, steps: int, latent_size: tuple[int, int] | None = None) -> Any:
    """A fresh scheduler `name` (`ddim`, `euler`, `dpm++`, `unipc`) with its timesteps set, all deterministic.

    Flow-matching families get `FlowMatchEulerDiscreteScheduler` for `ddim` and `euler`.

    Args:
        latent_size: (h, w), on which the shift of some flow schedules depends; default the model's own.

    Raises:
        InputError: the sampler is not for flow matching, and the family is.
    """
    import diffusers

    if backbone.prediction_type == FLOW:
        return _flow_scheduler(backbone, name, steps, latent_size)
    check_steps(backbone, steps, "steps")
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "dpm++": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }
    # Latents are not pixels: DDIM's default of clipping z_0 to [-1, 1] is wrong for them. diffusers' pipelines mend the
    # config of old checkpoints in the same way.
    # A base's own sampler may be of another kind (DEIS) or draw noise that follows from no image's seed (sde-).
    own: dict[str, dict[str, Any]] = {"ddim": {"clip_sample": False}, "dpm++": {"algorithm_type": "dpmsolver++"}}
    scheduler = classes[name].from_config(backbone.pipeline.scheduler.config, **own.get(name, {}))
    scheduler.set_timesteps(steps, device=backbone.device)
    return scheduler


def check_steps(backbone: Backbone, steps: int, name: str) -> None:
    """Raises `InputError`: more sampling steps than the base has timesteps; `name` is the setting's."""
    most = int(backbone.pipeline.scheduler.config.num_train_timesteps)
    if steps > most:
        raise InputError(f"{name} {steps}: base `{backbone.name}` has {most} timesteps; give no more steps than that")


def _flow_scheduler(backbone: Backbone, name: str, steps: int, latent_size: tuple[int, int] | None) -> Any:
    import diffusers

    if name not in FLOW_SAMPLERS:
        known = " or ".join(f"`{sampler}`" for sampler in FLOW_SAMPLERS)
        raise InputError(
            f"scheduler `{name}` is not for flow matching, which base `{backbone.name}` uses; give {known}"
        )
    height, width = latent_size or [side // backbone.vae_scale for side in backbone.image_size]
    config = backbone.pipeline.scheduler.config
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        config,
        shift=config.get("shift", config.get("flow_shift", 1.0)),  # the latter is what UniPC and DPM++ call it
        stochastic_sampling=False,  # its noise would follow from no image's seed
    )
    schedule = cast(FlowSchedule, backbone).schedule(steps, height, width)
    scheduler.set_timesteps(device=backbone.device, **schedule)
    return scheduler


def initial_scale(scheduler: Any) -> float:
    """Standard deviation of the latents that sampling starts from: 1 for flow matching."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def model_input(scheduler: Any, latents: Tensor, timestep: Tensor) -> Tensor:
    """The denoiser's input z_t `[B, C, h, w]` of the sampler's latents; flow matching knows no other scale."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    scaled: Tensor = scheduler.scale_model_input(latents, timestep)
    return scaled


def input_scale(scheduler: Any, timestep: Tensor) -> Tensor:
    """[] factor between the sampler's latents and the denoiser's input: 1 for most, 1/sqrt(sigma^2 + 1) for Euler."""
    return model_input(scheduler, torch.ones((), device=timestep.device), timestep)


def move_state(scheduler: Any, latents: Tensor, corrected: Tensor, timestep: Tensor) -> Tensor:
    """The sampler's latents whose denoiser input is `corrected` [B, C, h, w]; its memory moves along.

    To be called between two steps: after the one that gave `latents`, before the one at `timestep`.
    """
    moved = corrected / input_scale(scheduler, timestep)
    shift_memory(scheduler, moved - latents)
    return moved


def check_state_sampler(scheduler: Any) -> None:
    """Raise `InputError` for a sampler whose memory we do not know how to move: it might undo a correction unseen."""
    name = type(scheduler).__name__
    if name not in STATE_SAMPLERS:
        raise InputError(
            f"self-correction of the state is not known to survive {name}; set `pipeline.scheduler` to one of "
            f"{', '.join(STATE_SAMPLERS)}, or use correction_mode noise"
        )


def shift_memory(scheduler: Any, shift: Tensor) -> None:
    """Move what a multi-step sampler remembers along with the present latent, which moves by `shift` [B, C, h, w].

    UniPC does not step from the latent that it is given: its corrector rebuilds it from `last_sample`, the latent of
    the step before, and would undo the correction. And both UniPC and DPM++ take a jump between the remembered and the
    present estimate of z_0 for the path's curvature, and overshoot. So the remembered path moves as a whole, the noise
    unchanged: with z = a z_0 + s noise, every z_0 by shift / a_now, every latent by that times its own a.
    """
    if getattr(scheduler, "step_index", None) is None or not hasattr(scheduler, "model_outputs"):
        return
    now, before = (_alpha(scheduler, scheduler.sigmas[scheduler.step_index - back]) for back in (0, 1))
    clean_shift = shift / now
    if _remembers_clean(scheduler):
        scheduler.model_outputs = [
            None if output is None else (output + clean_shift).to(output.dtype) for output in scheduler.model_outputs
        ]
    if getattr(scheduler, "last_sample", None) is not None:
        moved = scheduler.last_sample + clean_shift * before
        scheduler.last_sample = moved.to(scheduler.last_sample.dtype)  # UniPC's next latents get its dtype


def _alpha(scheduler: Any, sigma: Tensor) -> Tensor:
    """Signal scale a of a latent: in flow matching a = 1 - sigma, else sigma = s / a and a^2 + s^2 = 1."""
    return 1 - sigma if scheduler.config.get("use_flow_sigmas") else torch.rsqrt(1 + sigma**2)


def _remembers_clean(scheduler: Any) -> bool:
    """Does the memory hold estimates of z_0 (the default of both samplers), or of the noise?"""
    config = scheduler.config
    return bool(config.get("predict_x0", "dpmsolver++" in config.get("algorithm_type", "")))
