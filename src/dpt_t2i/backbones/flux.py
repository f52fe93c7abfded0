"""FLUX.1 (dev and schnell): double- and single-stream blocks, CLIP and T5, packed latents, flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpt_t2i.backbones import text as clip_text
from dpt_t2i.backbones.flow_noising import flow_noising, resolution_shift
from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.backbones.mmdit import JointParts, check_patches, joint_block_taps
from dpt_t2i.backbones.parts import architecture_of, check_tokenizer
from dpt_t2i.backbones.types import GUIDANCE, PipelineCall, TextStates
from dpt_t2i.errors import InputError

PATCH = 2  # latents are packed 2 x 2 into a token, before the transformer whose own patch size is 1
T5_TOKENS = 512  # diffusers' default `max_sequence_length`
ARCHITECTURE_KEYS = (
    "in_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)
TRAINING_GUIDANCE = 3.5  # what the denoiser is told where nobody samples: the default of diffusers' LoRA training


class FluxBackbone(JointParts):
    """A diffusers `FluxPipeline` as a feature function; implements `Backbone`.

    Taps `double0..` and `single0..`: the image stream after each block. Latents are `[B, C, h, w]` outside and packed
    inside. Guidance is distilled: a text carries the scale in `extras`, which reaches the denoiser where its config has
    a guidance embedding (dev), and nothing where it has none (schnell).

    Raises:
        InputError: a text encoder is missing, or a tokenizer cannot give character offsets.
    """

    guidance_scale = 3.5  # an input of the denoiser, no classifier-free guidance
    pipeline_call = PipelineCall(
        timestep_scale=1000.0,  # FLUX counts time in 0..1
        unpack=lambda tokens, height, width: unpack(tokens, height // PATCH, width // PATCH),
        pack=lambda latents: pack(latents),
    )

    def __init__(self, pipeline: Any, name: str = "unnamed") -> None:
        for key in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, key) is None:
                raise InputError(f"base `{name}` has no {key}: FLUX needs CLIP (its pooled text vector) and T5")
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            check_tokenizer(tokenizer, name)
        config = pipeline.transformer.config
        stages = {
            "double": ("transformer_blocks", config.num_layers),
            "single": ("single_transformer_blocks", config.num_single_layers),
        }
        channels = config.num_attention_heads * config.attention_head_dim
        taps = joint_block_taps(stages, channels, PATCH)
        super().__init__(pipeline, name, taps, flow_noising(pipeline.scheduler, name))
        self._limit = clip_text.token_limit(pipeline.tokenizer, pipeline.text_encoder)

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"]) // PATCH**2

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels: the VAE's, because the transformer's config names no size."""
        side = int(self.pipeline.vae.config.sample_size)
        return side, side

    def schedule(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """Arguments of `FlowMatchEulerDiscreteScheduler.set_timesteps` for latents of height x width.

        As the pipeline: sigmas 1 .. 1/steps, and the resolution's shift, which schnell's scheduler ignores.
        """
        mu = resolution_shift(self.pipeline.scheduler.config, height // PATCH, width // PATCH)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates:
        """Tokens `[B, 512, joint_attention_dim]` of T5; pooled `[B, P]` of CLIP, after its final norm, unprojected.

        Raises:
            InputError: a prompt is over a token limit and `on_truncate` is `error`; `warn` says what is cut.
        """
        clip = clip_text.tokenize(self.pipeline.tokenizer, prompts, self._limit, on_truncate)
        t5 = clip_text.tokenize(self.pipeline.tokenizer_2, prompts, T5_TOKENS, on_truncate)
        rows = torch.arange(len(prompts), device=self.device)
        with torch.no_grad():
            output = self.pipeline.text_encoder(clip.ids.to(self.device))
            tokens = self.pipeline.text_encoder_2(t5.ids.to(self.device))[0]
        return TextStates(
            tokens=tokens.float(),
            # The same as `pooler_output`, unless the encoder's config names another EOS than the tokenizer's.
            pooled=output.last_hidden_state[rows, clip.eos.to(self.device)].float(),
            mask=t5.mask.to(self.device),
            extras={
                "pooled_projections": output.pooler_output.float(),
                GUIDANCE: torch.full((len(prompts),), TRAINING_GUIDANCE, device=self.device),
            },
        )

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Characters `[start, end)` of each position of `encode_text(texts).tokens`; (0, 0) for special tokens."""
        return clip_text.token_offsets(self.pipeline.tokenizer_2, texts, T5_TOKENS)

    def fingerprint(self) -> dict[str, Any]:
        """What an artifact must remember of its base, plain JSON. The hash reads all weights: seconds for a big one."""
        architecture = architecture_of(self.config, ARCHITECTURE_KEYS) | {
            "family": "flux",
            "text_width": self.text_dim,
            "prediction_type": self.prediction_type,
        }
        return self.described(architecture)

    def _denoise(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        check_patches(noisy, PATCH, self.vae_scale)
        height, width = noisy.shape[-2] // PATCH, noisy.shape[-1] // PATCH
        prediction = self.denoiser(
            hidden_states=pack(noisy).to(self.dtype),
            timestep=timesteps.expand(len(noisy)).float() / self.num_train_timesteps,  # it multiplies by 1000 itself
            guidance=text.extras[GUIDANCE] if self.config["guidance_embeds"] else None,
            pooled_projections=text.extras["pooled_projections"].to(self.dtype),
            encoder_hidden_states=text.tokens.to(self.dtype),
            txt_ids=torch.zeros(text.tokens.shape[1], 3, device=self.device),
            img_ids=position_ids(height, width).to(self.device),
            return_dict=False,
        )[0]
        return unpack(prediction, height, width)


def pack(latents: Tensor) -> Tensor:
    """`[B, C, 2 h, 2 w]` -> tokens `[B, h * w, 4 C]`, each a patch of 2 x 2 with its channels outermost."""
    patches = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h, 2, w, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`; height and width in tokens."""
    patches = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height, width))  # [B, h, w, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def position_ids(height: int, width: int) -> Tensor:
    """`[h * w, 3]` float32: 0, row and column of each token, as the rotary embedding wants them; a text's are zeros."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
