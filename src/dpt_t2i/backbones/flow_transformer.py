"""What the flow-matching transformers (SD 3, FLUX) share: one patch size, blocks as taps, a VAE, flow noising."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpt_t2i.backbones import latents as vae_latents
from dpt_t2i.backbones.fingerprint import weights_hash
from dpt_t2i.backbones.flow_noising import FlowNoising, resolution_shift
from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.backbones.reader import read_maps, read_output
from dpt_t2i.backbones.taps import parse_taps
from dpt_t2i.backbones.tokens import tap_of_tokens, tokens_to_grid
from dpt_t2i.backbones.types import Features, Tap, TextStates
from dpt_t2i.errors import InputError


class FlowTransformer:
    """The part of `Backbone` that does not differ between the families; a family adds its texts and its forward call.

    Args:
        pipeline: its modules are used in place, frozen and in eval mode.
        taps: the named taps, in the order of the forward pass.
        patch: latent pixels per token side; also the stride of every tap.

    Raises:
        InputError: a tokenizer cannot give character offsets, has no EOS token, or is missing.
    """

    denoiser_key = "transformer"
    family: str
    architecture_keys: Sequence[str]  # entries of the denoiser's config that decide whether an artifact fits

    def __init__(self, pipeline: Any, name: str, taps: Mapping[str, Tap], patch: int) -> None:
        self.name = name
        self.pipeline = pipeline
        self.denoiser: nn.Module = pipeline.transformer
        self.taps = taps
        self.patch = patch
        self.noising = FlowNoising(int(pipeline.scheduler.config.num_train_timesteps))
        for key, part in pipeline.components.items():
            if key.startswith("tokenizer") and part is not None and not (part.is_fast and part.eos_token_id is not None):
                raise InputError(f"base `{name}`: {key} needs an EOS token and character offsets (a fast tokenizer)")
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    @property
    def config(self) -> Any:
        """The denoiser's own."""
        return self.pipeline.transformer.config

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights; a LoRA is float32 whatever this says."""
        return next(self.denoiser.parameters()).dtype

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def pooled_dim(self) -> int:
        return int(self.config.pooled_projection_dim)

    @property
    def text_dim(self) -> int:
        return int(self.config.joint_attention_dim)

    @property
    def num_train_timesteps(self) -> int:
        return self.noising.num_train_timesteps

    @property
    def prediction_type(self) -> str:
        return self.noising.prediction_type

    def schedule(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """Arguments of `FlowMatchEulerDiscreteScheduler.set_timesteps` for latents of height x width."""
        raise NotImplementedError

    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates:
        """Texts as this family's denoiser wants them."""
        raise NotImplementedError

    def forward_denoiser(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        """The velocity `[B, C, h, w]` of z_t, in the denoiser's dtype; sides are multiples of the patch."""
        raise NotImplementedError

    def parse_taps(self, text: str) -> tuple[Tap, ...]:
        """Named taps and dotted paths of inner modules with image tokens, joined with `_`.

        Raises:
            InputError: a tap is unknown, comes twice, or gives no image tokens.
        """
        return parse_taps(text, self.taps, self._inner_tap)

    def null_text(self, batch: int) -> TextStates:
        """The empty prompt, `batch` times."""
        return self.encode_text([""]).select(torch.zeros(batch, dtype=torch.long, device=self.device))

    def encode_image(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> clean latents `[B, C, h, w]`; with a generator a sample, else the mean.

        Raises:
            InputError: a side is no multiple of `vae_scale`.
        """
        return vae_latents.encode_image(self.pipeline.vae, pixels, self.vae_scale, generator)

    def decode_image(self, latents: Tensor) -> Tensor:
        """`[B, C, h, w]` -> pixels `[B, 3, H, W]`, nominally in [-1, 1], not clamped."""
        return vae_latents.decode_image(self.pipeline.vae, latents)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t `[B, C, h, w]` from clean latents, noise and timesteps `[B]` in 0..1000."""
        return self.noising.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should give, `[B, C, h, w]`: the velocity."""
        return self.noising.target(latents, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio `[B]`."""
        return self.noising.snr(timesteps)

    def features(self, noisy: Tensor, timesteps: Tensor, text: TextStates, taps: Sequence[Tap]) -> Features:
        """Maps of z_t `[B, C, h, w]` at `taps`, conditioned on `text`; stops at the deepest tap.

        Raises:
            InputError: a side of z_t is no multiple of the patch.
        """
        maps, _ = read_maps(self.denoiser, taps, self._pass(noisy, timesteps, text), early_exit=True)
        return self._as_features(maps, noisy, timesteps)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: TextStates, taps: Sequence[Tap] = ()
    ) -> tuple[Tensor, Features]:
        """The predicted velocity `[B, C, h, w]` float32, and the maps at `taps` of the same pass.

        Raises:
            InputError: a side of z_t is no multiple of the patch.
        """
        maps, prediction = read_maps(self.denoiser, taps, self._pass(noisy, timesteps, text), early_exit=False)
        assert prediction is not None
        return prediction.float(), self._as_features(maps, noisy, timesteps)

    def fingerprint(self) -> dict[str, Any]:
        """What an artifact must remember of its base, plain JSON. The hash reads all weights: seconds for a big one."""
        architecture = {key: self.config.get(key) for key in self.architecture_keys}
        architecture = {key: list(value) if isinstance(value, tuple) else value for key, value in architecture.items()}
        architecture |= {
            "family": self.family,
            "text_width": self.text_dim,
            "prediction_type": self.prediction_type,
        }
        return {"architecture": architecture, "name": self.name, "weights": weights_hash(self.denoiser)}

    def shift_for(self, height: int, width: int) -> float:
        """`mu` of the pipeline's scheduler for latents of height x width."""
        return resolution_shift(self.pipeline.scheduler.config, (height // self.patch) * (width // self.patch))

    def _pass(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Callable[[], Tensor]:
        height, width = noisy.shape[-2:]
        if height % self.patch or width % self.patch:
            raise InputError(
                f"latents of {height} x {width}: base `{self.name}` reads patches of {self.patch} x {self.patch}; both "
                f"sides of an image must be multiples of {self.patch * self.vae_scale} pixels"
            )
        return lambda: self.forward_denoiser(noisy, timesteps, text)

    def _as_features(self, maps: Mapping[str, Tensor], noisy: Tensor, timesteps: Tensor) -> Features:
        size = noisy.shape[-2] // self.patch, noisy.shape[-1] // self.patch
        grids = {name: tokens_to_grid(tokens.float(), *size) for name, tokens in maps.items()}
        return Features(grids, timesteps.expand(len(noisy)))

    def _inner_tap(self, path: str) -> Tap | None:
        """The tap of a module by its dotted path; what it gives is seen in one small pass that stops there."""
        if path not in dict(self.denoiser.named_modules()):
            return None
        side = 2 * self.patch
        noisy = torch.zeros(1, self.latent_channels, side, side, device=self.device)
        timesteps = torch.zeros(1, device=self.device)
        with torch.no_grad():
            output = read_output(self.denoiser, path, self._pass(noisy, timesteps, self.null_text(1)))
        return tap_of_tokens(path, output, tokens=4, stride=self.patch)

    @property
    def latent_channels(self) -> int:
        raise NotImplementedError
