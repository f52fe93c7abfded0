"""The half of a backbone that follows from its diffusers pipeline alone, the same for every family.

A family's class stands beside it and says what differs: the texts, the taps, the widths, the noising, and how its
denoiser is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dpt_t2i.backbones import latents as vae_latents
from dpt_t2i.backbones.fingerprint import HALF, part_hashes, weights_hash
from dpt_t2i.backbones.flow_noising import FlowNoising
from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.backbones.noising import Noising
from dpt_t2i.backbones.reader import read_maps, read_output
from dpt_t2i.backbones.shared_rows import shared_rows
from dpt_t2i.backbones.taps import parse_taps, tap_of_output
from dpt_t2i.backbones.types import Features, PipelineCall, Tap, TextStates, one_each
from dpt_t2i.errors import InputError

SAMPLE_SIZE = 128  # latent pixels a side where a denoiser's config names none: the pipelines' own default


class PipelineParts(ABC):
    """VAE, noising, and reading of a pipeline whose modules are used in place: frozen, in eval mode, shared with it."""

    denoiser_key: str  # the pipeline's attribute, and the prefix in a LoRA file
    guidance_scale: float  # the default of the pipeline's own `guidance_scale`
    guidance_interval = (0.0, 1.0)
    eta = 0.0
    upcast_vae = False  # does the pipeline heed the `force_upcast` of a VAE in float16?
    text_free: tuple[str, ...] = ()  # modules that run before the denoiser reads the text
    pipeline_call = PipelineCall()  # how the pipeline itself calls its denoiser: most do as `_denoise` does

    def __init__(self, pipeline: Any, name: str, taps: Mapping[str, Tap], noising: Noising | FlowNoising) -> None:
        self.name = name
        self.pipeline = pipeline
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_key)
        self.taps = taps
        self.noising = noising
        self._hashes: dict[str, Any] | None = None
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    @abstractmethod
    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates: ...

    @abstractmethod
    def _denoise(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        """The denoiser's prediction in its own dtype, shaped as `noisy`."""

    def described(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """A fingerprint: the family's own `architecture` with the hashes of the weights, those of a LoRA left out."""
        return {
            "architecture": dict(architecture),
            "name": self.name,
            **({"dtype": HALF} if self.dtype == torch.float16 else {}),
            **(self._hashes or self._read_hashes()),
        }

    def keep_hashes(self) -> None:
        """Read the weights' hashes now and for good: the base stays frozen, and may come to lie in parts."""
        self._hashes = self._read_hashes()

    def _read_hashes(self) -> dict[str, Any]:
        return {"weights": weights_hash(self.denoiser), "parts": part_hashes(self.pipeline)}

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs: where it lies, or where `enable_model_cpu_offload` takes it for a pass."""
        taken = getattr(getattr(self.denoiser, "_hf_hook", None), "execution_device", None)
        return next(self.denoiser.parameters()).device if taken is None else torch.device(taken)

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights; a LoRA is float32 whatever this says."""
        dtype: torch.dtype = self.denoiser.dtype  # type: ignore[assignment]  # diffusers': of packed weights, that of use
        return dtype

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The denoiser's own."""
        config: Mapping[str, Any] = getattr(self.pipeline, self.denoiser_key).config
        return config

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        size = self.config["sample_size"] or SAMPLE_SIZE
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale, width * self.vae_scale

    @property
    def num_train_timesteps(self) -> int:
        return self.noising.num_train_timesteps

    @property
    def prediction_type(self) -> str:
        return self.noising.prediction_type

    def parse_taps(self, text: str) -> tuple[Tap, ...]:
        """Taps by name (`up1`, `bottom0_up1`) or by dotted path (`up_blocks.1.attentions.0`), whose channels are found
        by one small pass. Raises `InputError` for an unknown name, naming the nearest."""
        return parse_taps(text, self.taps, self._inner_tap, dict(self.denoiser.named_modules()))

    def null_text(self, batch: int) -> TextStates:
        """The empty prompt, `batch` times."""
        return self.encode_text([""]).select(torch.zeros(batch, dtype=torch.long, device=self.device))

    def encode_image(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> clean latents `[B, C, h, w]`; with a generator a sample, else the mean.

        Raises:
            InputError: a side is no multiple of `vae_scale`.
        """
        return vae_latents.encode_image(self.pipeline.vae, pixels, self.vae_scale, generator, self.upcast_vae)

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode_image`: mean and log-variance, each `[B, C, h, w]`, before the denoiser's scaling."""
        return vae_latents.encode_posterior(self.pipeline.vae, pixels, self.vae_scale, self.upcast_vae)

    def decode_image(self, latents: Tensor) -> Tensor:
        """`[B, C, h, w]` -> pixels `[B, 3, H, W]`, nominally in [-1, 1], not clamped."""
        return vae_latents.decode_image(self.pipeline.vae, latents, self.upcast_vae)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """z_t `[B, C, h, w]`, the denoiser's input, from clean latents, noise and timesteps `[B]`."""
        return self.noising.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should give, `[B, C, h, w]`."""
        return self.noising.target(latents, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio `[B]`."""
        return self.noising.snr(timesteps)

    def features(
        self,
        noisy: Tensor,
        timesteps: Tensor | float,
        text: TextStates,
        taps: Sequence[Tap],
        pictures: Tensor | None = None,
    ) -> Features:
        """Maps of z_t `[B, C, h, w]` at `taps`, conditioned on `text`; stops at the deepest tap.

        Args:
            pictures: `[B]`: rows with the same number hold the same z_t and t, and are told apart by their texts alone.
                Changes speed only.
        """
        timesteps = one_each(timesteps, noisy)
        with self._shared(pictures, taps):
            maps, _ = read_maps(self.denoiser, taps, self._pass(noisy, timesteps, text), True, _sides(noisy))
        return _as_features(maps, timesteps)

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor | float,
        text: TextStates,
        taps: Sequence[Tap] = (),
        pictures: Tensor | None = None,
    ) -> tuple[Tensor, Features]:
        """The denoiser's prediction `[B, C, h, w]` float32, and the maps at `taps` of the same pass; `pictures` as in
        `features`."""
        timesteps = one_each(timesteps, noisy)
        with self._shared(pictures, taps):
            maps, prediction = read_maps(self.denoiser, taps, self._pass(noisy, timesteps, text), False, _sides(noisy))
        assert prediction is not None
        return prediction.float(), _as_features(maps, timesteps)

    def _shared(self, pictures: Tensor | None, taps: Sequence[Tap]) -> AbstractContextManager[None]:
        return shared_rows(self.denoiser, self.text_free, pictures, [tap.module for tap in taps])

    def _pass(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Callable[[], Tensor]:
        return lambda: self._denoise(noisy, timesteps, text)

    def _inner_tap(self, path: str) -> Tap | None:
        """The tap of a module by its dotted path; its channels are seen in one small pass that stops there.

        The latents are no square, so that a row of text tokens is not taken for a map.
        """
        if path not in dict(self.denoiser.named_modules()):
            return None
        side = 2 * max(tap.stride for tap in self.taps.values())
        noisy = torch.zeros(1, self.latent_channels, side, 2 * side, device=self.device)
        timesteps = torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            output = read_output(self.denoiser, path, self._pass(noisy, timesteps, self.null_text(1)))
        return tap_of_output(path, output, _sides(noisy))


def ddpm_noising(scheduler: Any, name: str) -> Noising:
    """The noise schedule that base `name` was trained with, from its own scheduler.

    Raises:
        InputError: the scheduler has no DDPM noise schedule, or predicts something unknown.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise InputError(f"base `{name}`: {type(scheduler).__name__} has no DDPM noise schedule (alphas_cumprod)")
    return Noising(alphas.float(), scheduler.config.prediction_type)


def architecture_of(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Entries of a denoiser's config that decide whether a LoRA or an adapter fits, as plain JSON."""
    entries = {key: config.get(key) for key in keys}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in entries.items()}


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises `InputError` where base `name`'s tokenizer cannot say where a token lies in the text, or where it ends."""
    if tokenizer is None or not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise InputError(f"base `{name}`: the tokenizer needs an EOS token and character offsets (a fast tokenizer)")


def _sides(noisy: Tensor) -> tuple[int, int]:
    return noisy.shape[-2], noisy.shape[-1]


def _as_features(maps: Mapping[str, Tensor], timesteps: Tensor) -> Features:
    return Features({name: map_.float() for name, map_ in maps.items()}, timesteps)
