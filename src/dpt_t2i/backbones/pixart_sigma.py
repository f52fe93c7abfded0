"""PixArt-Sigma: a diffusion transformer with cross attention to T5, DDPM noising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.backbones import text as encoder_text
from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.backbones.parts import (
    PipelineParts,
    architecture_of,
    check_tokenizer,
    ddpm_noising,
)
from dpt_t2i.backbones.types import Tap, TextStates
from dpt_t2i.errors import InputError

MAX_TOKENS = 300  # `max_sequence_length` of the pipeline; T5 itself has no limit
ARCHITECTURE_KEYS = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "cross_attention_dim",
    "caption_channels",
    "patch_size",
)


class PixArtSigmaBackbone(PipelineParts):
    """A diffusers `PixArtSigmaPipeline` as a feature function; implements `Backbone`.

    T5 gives no pooled vector: p(y) is the mean of its states over the real tokens, EOS included. As in the pipeline,
    prompts are lowercased.

    Raises:
        InputError: the text encoder or tokenizer is missing or unfit, or the transformer wants further conditions.
    """

    denoiser_key = "transformer"
    upcast_vae = True
    guidance_scale = 4.5

    def __init__(self, pipeline: Any, name: str = "unnamed") -> None:
        check_tokenizer(pipeline.tokenizer, name)
        if pipeline.text_encoder is None:
            raise InputError(f"base `{name}` lacks its text encoder; give a folder with text_encoder")
        if pipeline.transformer.use_additional_conditions:
            raise InputError(f"base `{name}`: its transformer takes size conditions, which is PixArt-Alpha, not Sigma")
        super().__init__(pipeline, name, dit_taps(pipeline.transformer.config), ddpm_noising(pipeline.scheduler, name))
        self._limit = min(int(pipeline.tokenizer.model_max_length), MAX_TOKENS)

    @property
    def pooled_dim(self) -> int:
        return self.text_dim

    @property
    def text_dim(self) -> int:
        return int(self.pipeline.text_encoder.config.d_model)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates:
        """T5's token states, as the pipeline feeds them, and their mean over real tokens.

        Raises:
            InputError: a prompt is over the token limit and `on_truncate` is `error`; `warn` says what is cut.
        """
        tokenized = encoder_text.tokenize(self.pipeline.tokenizer, _lower(prompts), self._limit, on_truncate)
        mask = tokenized.mask.to(self.device)
        encoder = self.pipeline.text_encoder
        tokens = encoder(tokenized.ids.to(self.device), attention_mask=mask.long())[0].float()
        weights = mask[..., None].float()
        return TextStates(tokens, (tokens * weights).sum(dim=1) / weights.sum(dim=1), mask)

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Characters `[start, end)` of each position of `encode_text(texts).tokens`; (0, 0) for special tokens."""
        return encoder_text.token_offsets(self.pipeline.tokenizer, _lower(texts), self._limit)

    def fingerprint(self) -> dict[str, Any]:
        """What an artifact must remember of its base, plain JSON. The hash reads all weights: seconds for a big one."""
        architecture = architecture_of(self.config, ARCHITECTURE_KEYS) | {
            "family": "pixart-sigma",
            "text_width": self.text_dim,
            "prediction_type": self.prediction_type,
        }
        return self.described(architecture)

    def _denoise(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        height, width = noisy.shape[-2:]
        patch = int(self.config["patch_size"])
        if height % patch or width % patch:
            scale = self.vae_scale
            raise InputError(
                f"image of {width * scale} x {height * scale} pixels: both sides must be multiples of {patch * scale}"
            )
        prediction: Tensor = self.denoiser(
            noisy.to(self.dtype),
            encoder_hidden_states=text.tokens.to(self.dtype),
            timestep=timesteps,
            encoder_attention_mask=text.mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return prediction[
            :, : self.latent_channels
        ]  # behind the noise lies a learned variance, which nobody samples with


def dit_taps(config: Mapping[str, Any]) -> dict[str, Tap]:
    """`block0`, `block1`, ...: the image tokens after each block of a diffusion transformer, laid out as a map."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return {
        f"block{index}": Tap(f"block{index}", f"transformer_blocks.{index}", width, config["patch_size"])
        for index in range(config["num_layers"])
    }


def _lower(texts: Sequence[str]) -> list[str]:
    """Lowercased without a change of length, so that offsets hold for the text as it was written."""
    return ["".join(low if len(low := letter.lower()) == 1 else letter for letter in text) for text in texts]
