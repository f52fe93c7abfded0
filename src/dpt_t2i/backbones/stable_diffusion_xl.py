"""Stable Diffusion XL: a U-Net, two CLIP text encoders, sizes as added conditions, DDPM noising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.backbones import text as clip_text
from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.backbones.parts import (
    PipelineParts,
    architecture_of,
    check_tokenizer,
    ddpm_noising,
)
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.backbones.unet_taps import ARCHITECTURE_KEYS, unet_taps
from dpt_t2i.errors import InputError

SIZE_CONDITIONS = 6  # height and width of the original, top and left of the crop, height and width of the target


class StableDiffusionXLBackbone(PipelineParts):
    """A diffusers `StableDiffusionXLPipeline` as a feature function; implements `Backbone`.

    The pooled vector p(y) is the second encoder's projection. An image counts as uncropped and of its own size.

    Raises:
        InputError: an encoder or tokenizer is missing or unfit, or the U-Net takes other conditions (a refiner).
    """

    denoiser_key = "unet"
    upcast_vae = True
    guidance_scale = 5.0

    def __init__(self, pipeline: Any, name: str = "unnamed") -> None:
        _check_text_encoders(pipeline, name)
        config = pipeline.unet.config
        conditions = SIZE_CONDITIONS * (config.addition_time_embed_dim or 0)
        if config.projection_class_embeddings_input_dim != pipeline.text_encoder_2.config.projection_dim + conditions:
            raise InputError(f"base `{name}`: its U-Net takes other size conditions; give the base model, no refiner")
        super().__init__(pipeline, name, unet_taps(config), ddpm_noising(pipeline.scheduler, name))
        self._encoders = (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        )
        self._limit = min(clip_text.token_limit(*pair) for pair in self._encoders)

    @property
    def pooled_dim(self) -> int:
        return int(self.pipeline.text_encoder_2.config.projection_dim)

    @property
    def text_dim(self) -> int:
        return sum(int(encoder.config.hidden_size) for _, encoder in self._encoders)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates:
        """Both encoders' last but one states side by side, as the pipeline feeds them, and p(y).

        `extras["text_embeds"]` is what the pipeline gives the U-Net as pooled vector. p(y) is projected from the state
        at the tokenizer's own EOS; both are the same wherever the text config names that token. The empty prompt is
        all zeros where the pipeline's config says `force_zeros_for_empty_prompt`, as a pipeline without a negative
        prompt has it.

        Raises:
            InputError: a prompt is over the token limit and `on_truncate` is `error`; `warn` says what is cut.
        """
        first, second = (
            clip_text.tokenize(tokenizer, prompts, self._limit, how)
            for (tokenizer, _), how in zip(self._encoders, (on_truncate, "ignore"), strict=True)
        )
        encoded = [
            encoder(tokenized.ids.to(self.device), output_hidden_states=True)
            for (_, encoder), tokenized in zip(self._encoders, (first, second), strict=True)
        ]
        tokens = torch.cat([states.hidden_states[-2].float() for states in encoded], dim=-1)
        kept = self._kept(prompts)
        rows = torch.arange(len(tokens), device=self.device)
        at_eos = encoded[1].last_hidden_state[rows, second.eos.to(self.device)]
        pooled = self.pipeline.text_encoder_2.text_projection(at_eos).float()
        extras = {"text_embeds": encoded[1].text_embeds.float() * kept}
        return TextStates(tokens * kept[..., None], pooled * kept, first.mask.to(self.device), extras)

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Characters `[start, end)` of each position of `encode_text(texts).tokens`; (0, 0) for special tokens.

        They are the first tokenizer's; the published second one differs from it in padding alone.
        """
        return clip_text.token_offsets(self.pipeline.tokenizer, texts, self._limit)

    def fingerprint(self) -> dict[str, Any]:
        """What an artifact must remember of its base, plain JSON. The hash reads all weights: seconds for a big one."""
        architecture = architecture_of(self.config, ARCHITECTURE_KEYS) | {
            "family": "stable-diffusion-xl",
            "text_width": self.text_dim,
            "pooled_width": self.pooled_dim,
            "prediction_type": self.prediction_type,
        }
        return self.described(architecture)

    def _kept(self, prompts: Sequence[str]) -> Tensor:
        """`[B, 1]`: 0 for the empty prompt where it stands for "no condition", else 1."""
        zeros = self.pipeline.config.force_zeros_for_empty_prompt
        return torch.tensor([[float(not zeros or prompt != "")] for prompt in prompts], device=self.device)

    def _denoise(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        height, width = (side * self.vae_scale for side in noisy.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype, device=self.device)
        prediction: Tensor = self.denoiser(
            noisy.to(self.dtype),
            timesteps,
            encoder_hidden_states=text.tokens.to(self.dtype),
            added_cond_kwargs={
                "text_embeds": text.extras["text_embeds"].to(self.dtype),
                "time_ids": sizes.expand(len(noisy), -1),
            },
            return_dict=False,
        )[0]
        return prediction


def _check_text_encoders(pipeline: Any, name: str) -> None:
    check_tokenizer(pipeline.tokenizer, name)
    check_tokenizer(pipeline.tokenizer_2, name)
    if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
        raise InputError(f"base `{name}` lacks a text encoder; give a folder with text_encoder and text_encoder_2")
    if not hasattr(pipeline.text_encoder_2, "text_projection"):
        raise InputError(
            f"base `{name}`: text_encoder_2 ({type(pipeline.text_encoder_2).__name__}) gives no pooled vector; "
            "it must be a CLIPTextModelWithProjection"
        )
