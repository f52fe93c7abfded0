"""Stable Diffusion 3 and 3.5: an MMDiT, two CLIP text encoders and an optional T5, flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpt_t2i.backbones import text as clip_text
from dpt_t2i.backbones.flow_noising import flow_noising, resolution_shift
from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.backbones.mmdit import JointParts, check_patches, joint_block_taps
from dpt_t2i.backbones.parts import architecture_of, check_tokenizer
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.errors import InputError

T5_TOKENS = 256  # diffusers' default `max_sequence_length`; without T5 as many zeros
ARCHITECTURE_KEYS = (
    "patch_size",
    "in_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "caption_projection_dim",
    "pooled_projection_dim",
    "dual_attention_layers",
    "qk_norm",
)


class StableDiffusion3Backbone(JointParts):
    """A diffusers `StableDiffusion3Pipeline` as a feature function; implements `Backbone`.

    Taps `block0..`: the image stream after each joint block. Texts are laid out as the pipeline does: the two CLIPs'
    states side by side, padded to T5's width, then T5's behind them along L. The words of a text are at CLIP's
    positions; T5's repeat them and count as padding in `mask` and `token_offsets`, so that a word has one place.

    Raises:
        InputError: a CLIP encoder is missing, or a tokenizer cannot give character offsets.
    """

    guidance_scale = 7.0

    def __init__(self, pipeline: Any, name: str = "unnamed") -> None:
        for key in ("text_encoder", "text_encoder_2"):
            if getattr(pipeline, key) is None:
                raise InputError(f"base `{name}` has no {key}: without both CLIPs there is no pooled text vector")
        third = [] if pipeline.text_encoder_3 is None else [pipeline.tokenizer_3]
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, *third):
            check_tokenizer(tokenizer, name)
        config = pipeline.transformer.config
        channels = config.num_attention_heads * config.attention_head_dim
        taps = joint_block_taps({"block": ("transformer_blocks", config.num_layers)}, channels, config.patch_size)
        super().__init__(pipeline, name, taps, flow_noising(pipeline.scheduler, name))
        self._limit = clip_text.token_limit(pipeline.tokenizer, pipeline.text_encoder)

    def schedule(self, steps: int, height: int, width: int) -> dict[str, Any]:
        """Arguments of `FlowMatchEulerDiscreteScheduler.set_timesteps` for latents of height x width.

        As the pipeline: the scheduler's own sigmas, shifted by the resolution only where its config says so.
        """
        config, patch = self.pipeline.scheduler.config, self.config["patch_size"]
        if not config.get("use_dynamic_shifting"):
            return {"num_inference_steps": steps}
        return {"num_inference_steps": steps, "mu": resolution_shift(config, height // patch, width // patch)}

    def encode_text(self, prompts: Sequence[str], on_truncate: OnTruncate = "warn") -> TextStates:
        """Tokens `[B, L + 256, joint_attention_dim]`; pooled `[B, P]`: both CLIPs' projections, side by side.

        Raises:
            InputError: a prompt is over a token limit and `on_truncate` is `error`; `warn` says what is cut.
        """
        pipeline = self.pipeline
        first, fed, pooled, mask = self._clip(pipeline.tokenizer, pipeline.text_encoder, prompts, on_truncate)
        # The second CLIP shares the first's vocabulary: one warning is enough.
        second, fed_2, pooled_2, _ = self._clip(pipeline.tokenizer_2, pipeline.text_encoder_2, prompts, "ignore")
        t5 = self._t5(prompts, on_truncate)
        clip = torch.cat([first, second], dim=-1)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return TextStates(
            tokens=torch.cat([clip, t5], dim=1),
            pooled=torch.cat([pooled, pooled_2], dim=-1),
            mask=F.pad(mask, (0, t5.shape[1])),
            extras={"pooled_projections": torch.cat([fed, fed_2], dim=-1)},
        )

    def token_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Characters `[start, end)` of each position of `encode_text(texts).tokens`; (0, 0) for special and T5's."""
        rows = clip_text.token_offsets(self.pipeline.tokenizer, texts, self._limit)
        return [row + [(0, 0)] * T5_TOKENS for row in rows]

    def fingerprint(self) -> dict[str, Any]:
        """What an artifact must remember of its base, plain JSON. The hash reads all weights: seconds for a big one."""
        architecture = architecture_of(self.config, ARCHITECTURE_KEYS) | {
            "family": "stable-diffusion-3",
            "text_width": self.text_dim,
            "prediction_type": self.prediction_type,
        }
        return self.described(architecture)

    def _denoise(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        patch, most = self.config["patch_size"], self.config["pos_embed_max_size"]
        check_patches(noisy, patch, self.vae_scale)
        if max(noisy.shape[-2:]) > most * patch:
            raise InputError(
                f"base `{self.name}` knows at most {most} patches a side: images of {most * patch * self.vae_scale} "
                f"pixels, not {max(noisy.shape[-2:]) * self.vae_scale}"
            )
        prediction: Tensor = self.denoiser(
            hidden_states=noisy.to(self.dtype),
            timestep=timesteps.expand(len(noisy)),
            encoder_hidden_states=text.tokens.to(self.dtype),
            pooled_projections=text.extras["pooled_projections"].to(self.dtype),
            return_dict=False,
        )[0]
        return prediction

    def _clip(
        self, tokenizer: Any, encoder: Any, prompts: Sequence[str], on_truncate: OnTruncate
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The last but one layer's states `[B, L, D]`, the projection as the pipeline takes it, the same read at the
        tokenizer's own EOS (the two differ only where the encoder's config names another EOS), and the mask."""
        tokenized = clip_text.tokenize(tokenizer, prompts, self._limit, on_truncate)
        with torch.no_grad():
            output = encoder(tokenized.ids.to(self.device), output_hidden_states=True)
            rows = torch.arange(len(tokenized.ids), device=self.device)
            pooled = encoder.text_projection(output.last_hidden_state[rows, tokenized.eos.to(self.device)])
        tokens = output.hidden_states[-2]
        return tokens.float(), output.text_embeds.float(), pooled.float(), tokenized.mask.to(self.device)

    def _t5(self, prompts: Sequence[str], on_truncate: OnTruncate) -> Tensor:
        """`[B, 256, joint_attention_dim]`; zeros where the base was loaded without its T5."""
        if self.pipeline.text_encoder_3 is None:
            return torch.zeros(len(prompts), T5_TOKENS, self.text_dim, device=self.device)
        tokenized = clip_text.tokenize(self.pipeline.tokenizer_3, prompts, T5_TOKENS, on_truncate)
        with torch.no_grad():
            states: Tensor = self.pipeline.text_encoder_3(tokenized.ids.to(self.device))[0]
        return states.float()
