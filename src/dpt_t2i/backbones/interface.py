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

    def parse_taps(self, text: str) -> tuple[Tap, ...]:
        """Taps by name (`up1`, `bottom0_up1`) or dotted path; `InputError` names the nearest of an unknown one."""
        ...

    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates:
        """B prompts -> states `[B, L, D]`, pooled `[B, P]`, mask `[B, L]`; `on_truncate` says what a long one does."""
        ...

    def null_text(self, batch: int) -> TextStates:
        """The empty prompt, `batch` times."""
        ...

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """For each text the character range `[start, end)` of each of its L tokens; (0, 0) of special ones."""
        ...

    def encode_image(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> clean latents `[B, C, h, w]`; with a generator a sample, else the mean."""
        ...

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, 3, H, W]` in [-1, 1] -> mean and log-variance `[B, C, h, w]`, before the denoiser's scaling."""
        ...

    def decode_image(self, latents: Tensor) -> Tensor:
        """`[B, C, h, w]` -> pixels `[B, 3, H, W]`, nominally in [-1, 1] and not clamped."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Clean latents and noise `[B, C, h, w]`, timesteps `[B]`, or one for all -> z_t `[B, C, h, w]`."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict there: noise, v, or the flow's velocity, `[B, C, h, w]`."""
        ...

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio `[B]` at timesteps `[B]`."""
        ...

    def features(
        self,
        noisy: Tensor,
        timesteps: Tensor | float,
        text: TextStates,
        taps: Sequence[Tap],
        pictures: Tensor | None = None,
    ) -> Features:
        """Maps at `taps` of a pass at z_t `[B, C, h, w]` and t `[B]`, or one for all, that ends at the deepest of them.

        `pictures` `[B]`: rows with the same number show the same z_t at the same t, and may be computed once.
        """
        ...

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor | float,
        text: TextStates,
        taps: Sequence[Tap] = (),
        pictures: Tensor | None = None,
    ) -> tuple[Tensor, Features]:
        """The whole prediction `[B, C, h, w]`, and the maps at `taps` on its way."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Architecture, name and hashes of the weights, plain JSON; see `check_fingerprint`."""
        ...

    def keep_hashes(self) -> None:
        """Read the weights' hashes now and for good."""
        ...
