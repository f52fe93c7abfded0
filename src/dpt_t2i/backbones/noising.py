"""The noising of DDPM-style families (Ho et al., 2020): z_t = sqrt(a) z_0 + sqrt(1 - a) noise, a = `alphas_cumprod[t]`.

z_t is always the denoiser's own input, whatever scale a sampler keeps its latents in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_t2i.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Noising:
    """All tensors `[B, C, h, w]`, timesteps `[B]` (long)."""

    alphas_cumprod: Tensor  # [num_train_timesteps] float32
    prediction_type: str  # what the denoiser was trained to predict

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise InputError(f"scheduler config: prediction_type `{self.prediction_type}` is not one of {known}")

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        signal, sigma = self._scales(torch.as_tensor(timesteps, device=latents.device).reshape(-1))
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect denoiser predicts: the noise, v = sqrt(a) noise - sqrt(1 - a) z_0, or z_0 itself."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = self._scales(timesteps)
        return signal * noise - sigma * latents

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio a / (1 - a), `[B]` (min-SNR weighting, Hang et al., 2023)."""
        alphas = self._alphas(timesteps)
        return alphas / (1 - alphas)

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self._alphas(timesteps)[:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def _alphas(self, timesteps: Tensor) -> Tensor:
        return self.alphas_cumprod.to(timesteps.device)[timesteps.long()]
