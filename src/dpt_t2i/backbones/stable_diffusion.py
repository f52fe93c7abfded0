"""Stable Diffusion 1.x and 2.x: a U-Net, one CLIP text encoder, DDPM noising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpt_t2i.backbones import latents as vae_latents
from dpt_t2i.backbones import text as clip_text
from dpt_t2i.backbones.fingerprint import weights_hash
from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.backbones.noising import Noising
from dpt_t2i.backbones.reader import read_maps, read_output
from dpt_t2i.backbones.taps import parse_taps, tap_of_output
from dpt_t2i.backbones.types import Features, PipelineCall, Tap, TextStates
from dpt_t2i.backbones.unet_taps import unet_taps
from dpt_t2i.errors import InputError

# Entries of the U-Net's config that decide whether a LoRA or an adapter fits.
ARCHITECTURE_KEYS = (
    "in_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
)


class StableDiffusionBackbone:
    """A diffusers `StableDiffusionPipeline` as a feature function; implements `Backbone`.

    The pipeline's modules are used in place: frozen, in eval mode, and shared with `pipeline`, so a LoRA added here is
    also that of the pipeline.

    Raises:
        InputError: the tokenizer cannot give character offsets or has no EOS token.
    """

    denoiser_key = "unet"
    pipeline_call = PipelineCall()

    def __init__(self, pipeline: Any, name: str = "unnamed") -> None:
        self.name = name
        self.pipeline = pipeline
        self.denoiser: nn.Module = pipeline.unet
        self.taps: Mapping[str, Tap] = unet_taps(pipeline.unet.config)
        if not pipeline.tokenizer.is_fast or pipeline.tokenizer.eos_token_id is None:
            raise InputError(
                f"base `{name}`: the tokenizer needs an EOS token and character offsets (a fast tokenizer)"
            )
        scheduler = pipeline.scheduler
        self.noising = Noising(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)
        self._limit = clip_text.token_limit(pipeline.tokenizer, pipeline.text_encoder)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights; a LoRA is float32 whatever this says."""
        return next(self.denoiser.parameters()).dtype

    @property
    def latent_channels(self) -> int:
        return int(self.pipeline.unet.config.in_channels)

    @property
    def vae_scale(self) -> int:
        """Image pixels per latent pixel."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        size = self.pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale, width * self.vae_scale

    @property
    def pooled_dim(self) -> int:
        return int(self.pipeline.text_encoder.config.hidden_size)

    @property
    def text_dim(self) -> int:
        return int(self.pipeline.text_encoder.config.hidden_size)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.noising.alphas_cumprod)

    @property
    def prediction_type(self) -> str:
        return self.noising.prediction_type

    def parse_taps(self, text: str) -> tuple[Tap, ...]:
        """Taps by name (`up1`, `bottom0_up1`) or by dotted path (`up_blocks.1.resnets.0`), whose channels are found by
        one small pass. Raises `InputError` for an unknown name, naming the nearest."""
        return parse_taps(text, self.taps, self._inner_tap)

    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates:
        """Token states that the pipeline itself would feed, and p(y): the state at EOS, without projection.

        Raises:
            InputError: a prompt is over the token limit and `on_truncate` is `error`; `warn` says what is cut.
        """
        tokenized = clip_text.tokenize(self.pipeline.tokenizer, prompts, self._limit, on_truncate)
        encoder = self.pipeline.text_encoder
        mask = tokenized.mask.to(self.device)
        # As the pipeline: CLIP is causal, so padding is seen by nothing that matters, except where the config asks.
        attend = mask.long() if getattr(encoder.config, "use_attention_mask", False) else None
        with torch.no_grad():
            tokens = encoder(tokenized.ids.to(self.device), attention_mask=attend)[0].float()
        pooled = tokens[torch.arange(len(tokens), device=self.device), tokenized.eos.to(self.device)]
        return TextStates(tokens, pooled, mask)

    def null_text(self, batch: int) -> TextStates:
        """The empty prompt, `batch` times."""
        return self.encode_text([""]).select(torch.zeros(batch, dtype=torch.long, device=self.device))

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Characters `[start, end)` of each position of `encode_text(texts).tokens`; (0, 0) for special tokens."""
        return clip_text.token_offsets(self.pipeline.tokenizer, texts, self._limit)

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
        """z_t `[B, C, h, w]`, the denoiser's input, from clean latents, noise and timesteps `[B]`."""
        return self.noising.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should give, `[B, C, h, w]`."""
        return self.noising.target(latents, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio `[B]`."""
        return self.noising.snr(timesteps)

    def features(self, noisy: Tensor, timesteps: Tensor, text: TextStates, taps: Sequence[Tap]) -> Features:
        """Maps of z_t `[B, C, h, w]` at `taps`, conditioned on `text`; stops at the deepest tap."""
        maps, _ = read_maps(self.denoiser, taps, lambda: self._denoise(noisy, timesteps, text), early_exit=True)
        return _as_features(maps, noisy, timesteps)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, text: TextStates, taps: Sequence[Tap] = ()
    ) -> tuple[Tensor, Features]:
        """The denoiser's prediction `[B, C, h, w]` float32, and the maps at `taps` of the same pass."""
        maps, prediction = read_maps(
            self.denoiser, taps, lambda: self._denoise(noisy, timesteps, text), early_exit=False
        )
        assert prediction is not None
        return prediction.float(), _as_features(maps, noisy, timesteps)

    def fingerprint(self) -> dict[str, Any]:
        """What an artifact must remember of its base, plain JSON. The hash reads all weights: seconds for a big one."""
        config = self.pipeline.unet.config
        architecture = {key: config.get(key) for key in ARCHITECTURE_KEYS}
        architecture = {key: list(value) if isinstance(value, tuple) else value for key, value in architecture.items()}
        architecture |= {
            "family": "stable-diffusion",
            "text_width": self.text_dim,
            "prediction_type": self.prediction_type,
        }
        return {"architecture": architecture, "name": self.name, "weights": weights_hash(self.denoiser)}

    def _denoise(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        prediction: Tensor = self.denoiser(
            noisy.to(self.dtype), timesteps, encoder_hidden_states=text.tokens.to(self.dtype), return_dict=False
        )[0]
        return prediction

    def _inner_tap(self, path: str) -> Tap | None:
        """The tap of a module by its dotted path; its channels are seen in one small pass that stops there."""
        if path not in dict(self.denoiser.named_modules()):
            return None
        side = 2 ** len(self.pipeline.unet.config.block_out_channels)  # twice the deepest stride: 2 x 2 at the bottom
        noisy = torch.zeros(1, self.latent_channels, side, side, device=self.device)
        timesteps = torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            text = self.null_text(1)
            output = read_output(self.denoiser, path, lambda: self._denoise(noisy, timesteps, text))
        return tap_of_output(path, output, side)


def _as_features(maps: Mapping[str, Tensor], noisy: Tensor, timesteps: Tensor) -> Features:
    return Features({name: map_.float() for name, map_ in maps.items()}, timesteps.expand(len(noisy)))
