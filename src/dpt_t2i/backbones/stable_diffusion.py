"""Stable Diffusion 1.x and 2.x: a U-Net, one CLIP text encoder, DDPM noising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.backbones import text as clip_text
from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.backbones.parts import PipelineParts, architecture_of, check_tokenizer, ddpm_noising
from dpt_t2i.backbones.shared_rows import before_text
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.backbones.unet_taps import ARCHITECTURE_KEYS, unet_taps
from dpt_t2i.errors import InputError


class StableDiffusionBackbone(PipelineParts):
    """A diffusers `StableDiffusionPipeline` as a feature function; implements `Backbone`.

    The pipeline's modules are used in place: frozen, in eval mode, and shared with `pipeline`, so a LoRA added here is
    also that of the pipeline.

    Raises:
        InputError: the tokenizer cannot give character offsets or has no EOS token, or the text encoder is missing or
            no CLIP.
    """

    denoiser_key = "unet"
    guidance_scale = 7.5

    def __init__(self, pipeline: Any, name: str = "unnamed") -> None:
        _check_text_encoder(pipeline.text_encoder, name)
        check_tokenizer(pipeline.tokenizer, name)
        super().__init__(pipeline, name, unet_taps(pipeline.unet.config), ddpm_noising(pipeline.scheduler, name))
        self.text_free = before_text(pipeline.unet)
        self._limit = clip_text.token_limit(pipeline.tokenizer, pipeline.text_encoder)

    @property
    def pooled_dim(self) -> int:
        return int(self.pipeline.text_encoder.config.hidden_size)

    @property
    def text_dim(self) -> int:
        return int(self.pipeline.text_encoder.config.hidden_size)

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

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Characters `[start, end)` of each position of `encode_text(texts).tokens`; (0, 0) for special tokens."""
        return clip_text.token_offsets(self.pipeline.tokenizer, texts, self._limit)

    def fingerprint(self) -> dict[str, Any]:
        """What an artifact must remember of its base, plain JSON. The hash reads all weights: seconds for a big one."""
        architecture = architecture_of(self.config, ARCHITECTURE_KEYS) | {
            "family": "stable-diffusion",
            "text_width": self.text_dim,
            "prediction_type": self.prediction_type,
        }
        return self.described(architecture)

    def _denoise(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        prediction: Tensor = self.denoiser(
            noisy.to(self.dtype), timesteps, encoder_hidden_states=text.tokens.to(self.dtype), return_dict=False
        )[0]
        return prediction


def _check_text_encoder(encoder: Any, name: str) -> None:
    if encoder is None:
        raise InputError(f"base `{name}` has no text_encoder, so there is no pooled text vector to match with")
    if not hasattr(encoder.config, "max_position_embeddings"):
        raise InputError(
            f"base `{name}`: text_encoder ({type(encoder).__name__}) gives no pooled text vector; it must be a "
            "CLIPTextModel"
        )
