"""Images to latents and back, through the pipeline's VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.errors import InputError

MOMENTS = ("latents_mean", "latents_std")  # per channel, in the config of some fine-tuned VAEs (Playground 2.5)


def encode_image(
    vae: Any, pixels: Tensor, vae_scale: int, generator: torch.Generator | None = None, upcast: bool = False
) -> Tensor:
    """`[B, 3, H, W]` in [-1, 1] -> `[B, C, H/scale, W/scale]` float32, scaled as the denoiser expects.

    Without a generator the posterior's mean, with one a sample (drawn on the generator's device). `upcast` as in
    `upcast_where_asked`.

    Raises:
        InputError: H or W is no multiple of `vae_scale`.
    """
    mean, log_variance = encode_posterior(vae, pixels, vae_scale, upcast)
    return draw_latents(vae, mean, log_variance, generator)


def encode_posterior(vae: Any, pixels: Tensor, vae_scale: int, upcast: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, each `[B, C, H/scale, W/scale]` float32, before the denoiser's scaling.

    Raises:
        InputError: H or W is no multiple of `vae_scale`.
    """
    height, width = pixels.shape[-2:]
    if height % vae_scale or width % vae_scale:
        raise InputError(f"image of {width} x {height} pixels: both sides must be multiples of {vae_scale}")
    with upcast_where_asked(vae) if upcast else nullcontext():
        posterior = vae.encode(pixels.to(_place(vae), vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.logvar.float()


def draw_latents(vae: Any, mean: Tensor, log_variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """From `encode_posterior`'s pair to what the denoiser expects: a sample, or without a generator the mean."""
    latents = mean
    if generator is not None:
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        latents = mean + torch.exp(0.5 * log_variance) * noise.to(mean.device)
    shift, scale = _statistics(vae, latents)
    return (latents - shift) * scale


def decode_image(vae: Any, latents: Tensor, upcast: bool = False) -> Tensor:
    """`[B, C, h, w]` -> pixels `[B, 3, H, W]` float32, nominally in [-1, 1] and not clamped."""
    shift, scale = _statistics(vae, latents)
    unscaled = latents.float() / scale + shift
    with upcast_where_asked(vae) if upcast else nullcontext():
        pixels: Tensor = vae.decode(unscaled.to(_place(vae), vae.dtype)).sample
    return pixels.float()


@contextmanager
def upcast_where_asked(vae: Any) -> Iterator[None]:
    """A VAE whose activations leave float16's range says `force_upcast`; within, it is float32.

    Before and after it is as its pipeline wants it: stock pipelines upcast by themselves, and only what they find in
    float16.
    """
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        yield
        return
    vae.float()
    try:
        yield
    finally:
        vae.half()


def _place(vae: Any) -> torch.device:
    """Where it runs: where it lies, or where `enable_model_cpu_offload` takes it."""
    taken = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
    return torch.device(vae.device if taken is None else taken)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(shift, scale) of latents, for all channels or `[1, C, 1, 1]`; older VAEs have a scale only."""
    config = vae.config
    shift, scale = float(config.get("shift_factor") or 0.0), float(config.scaling_factor)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return shift, scale
    mean, std = (torch.tensor(config[key], device=latents.device)[None, :, None, None] for key in MOMENTS)
    return mean, scale / std
