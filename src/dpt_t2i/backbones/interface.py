"""What every family offers, and all that the rest of the house may use of a text-to-image model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dpt_t2i.backbones.types import Features, PipelineCall, Tap, TextStates

OnTruncate = Literal["warn", "error", "ignore"]


class Backbone(Protocol):
    """Everything that crosses this door is float32; the dtype of the frozen weights is an inside matter.

    Timesteps are those of the denoiser's own conditioning: 0..num_train_timesteps-1 for DDPM-style families,
    0..1000 in floats for flow matching, whose `add_noise`, `target` and `snr` follow their own path.
    """

    name: str  # `bundled`, a hub id, or the folder's name
    pipeline: Any  # the diffusers pipeline that holds the very same modules
    denoiser: nn.Module
    denoiser_key: str  # prefix of the denoiser in a diffusers LoRA file: `unet`, `transformer`
    pipeline_call: PipelineCall  # how that pipeline calls the denoiser
    guidance_scale: float  # of sampling where the user names none: what the base publishes, else its family's default
    guidance_interval: tuple[float, float]  # likewise: first and last guided fraction of the schedule, else 0 and 1
    eta: float  # likewise, of DDIM: what the base publishes, else 0
    taps: Mapping[str, Tap]  # the named taps, in the order in which the denoiser reaches them

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def vae_scale(self) -> int: ...  # image pixels per latent pixel
    @property
    def image_size(self) -> tuple[int, int]: ...  # default (height, width) in pixels
    @property
    def pooled_dim(self) -> int: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def num_train_timesteps(self) -> int: ...
    @property
    def prediction_type(self) -> str: ...

    def parse_taps(self, text: str) -> tuple[Tap, ...]: ...
    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates: ...
    def null_text(self, batch: int) -> TextStates: ...
    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]: ...
    def encode_image(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor: ...
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...
    def decode_image(self, latents: Tensor) -> Tensor: ...
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...
    def snr(self, timesteps: Tensor) -> Tensor: ...
    def features(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: TextStates,
        taps: Sequence[Tap],
        pictures: Tensor | None = None,
    ) -> Features: ...
    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: TextStates,
        taps: Sequence[Tap] = (),
        pictures: Tensor | None = None,
    ) -> tuple[Tensor, Features]: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def keep_hashes(self) -> None: ...
