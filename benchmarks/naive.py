"""A training step as the released code does it, on our parts: the other arm of `benchmarks/train.py`.

Six passes of the denoiser an example, each with texts encoded for it, each read by the whole adapter. Nothing is shared
between passes. The LoRA is PEFT's, two small matrix products beside each projection and a sum; the adapter's attention
and dropout are `nn.MultiheadAttention` and `nn.Dropout`, as in the released transformer, but without the attention's
weights, which nobody reads, so by SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from dpt_t2i.adapter.dropout import Dropout
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.score import match_score
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora_linear import OneFunctionLinear
from dpt_t2i.backbones.types import Features, Tap, TextStates
from dpt_t2i.data.examples import Batch
from dpt_t2i.objectives.denoise import denoise_loss
from dpt_t2i.objectives.itm import itm_loss
from dpt_t2i.objectives.positions import positive_map
from dpt_t2i.objectives.rec import rec_losses
from dpt_t2i.objectives.types import GroundingTargets
from dpt_t2i.training.denoising import Draw


def _attend(attention: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`dpt_t2i.adapter.transformer.attend` by the module itself."""
    result: Tensor = attention(queries.expand(len(keys), -1, -1), keys, values, need_weights=False)[0]
    return result


@contextmanager
def _library_layers() -> Iterator[None]:
    with (
        patch.object(OneFunctionLinear, "forward", PeftLinear.forward),
        patch.object(Dropout, "forward", nn.Dropout.forward),
        patch("dpt_t2i.adapter.transformer.attend", _attend),
    ):
        yield


@dataclass(frozen=True)
class Naive:
    """Stage 1, or stage 2 where `tunes`: then the positive's pass goes to the end and gives the denoising loss too."""

    backbone: Backbone
    adapter: DiscriminativeAdapter
    taps: tuple[Tap, ...]
    tunes: bool

    def losses(self, batch: Batch, latents: Tensor, draw: Draw) -> dict[str, Tensor]:
        with _library_layers():
            return self._losses(batch, latents, draw)

    def _losses(self, batch: Batch, latents: Tensor, draw: Draw) -> dict[str, Tensor]:
        """The terms of `ProbeObjective` or `TuneObjective`. Every hard negative exists, and no caption is dropped.

        Args:
            latents: `[3 B, C, h, w]` of the examples' images, the hard negatives' and the random ones'.
        """
        own, hard, random = latents.chunk(3)
        terms: dict[str, Tensor] = {}
        if self.tunes:
            positive, terms["loss_mse"] = self._positive(batch, own, draw)
        else:
            positive = self._score(own, batch.captions, draw)
        hard_text, random_text = (
            self._score(own, texts, draw) for texts in (batch.hard_captions, batch.random_captions)
        )
        hard_image, random_image = (self._score(images, batch.captions, draw) for images in (hard, random))
        grounding, targets = self._ground(batch, own, draw)
        terms |= itm_loss(
            torch.stack([positive, hard_text, random_text], dim=1),
            torch.stack([positive, hard_image, random_image], dim=1),
            grounding.logit_scale,
        )
        return terms | rec_losses(grounding, targets, batch.num_boxes())

    def _score(self, latents: Tensor, texts: Sequence[str], draw: Draw) -> Tensor:
        features, text = self._features(latents, texts, draw)
        return match_score(self.adapter(features), text.pooled)

    def _ground(self, batch: Batch, latents: Tensor, draw: Draw) -> tuple[AdapterOutput, GroundingTargets]:
        features, text = self._features(latents, batch.expressions, draw)
        offsets = self.backbone.token_offsets(batch.expressions)
        classes = self.adapter.config.num_token_classes
        rows = [
            positive_map(tokens, [[span] for span in spans], classes)
            for tokens, spans in zip(offsets, batch.spans, strict=True)
        ]
        return self.adapter(features, text.tokens, text.mask), GroundingTargets(batch.boxes, tuple(rows))

    def _features(self, latents: Tensor, texts: Sequence[str], draw: Draw) -> tuple[Features, TextStates]:
        text = self.backbone.encode_text(texts, "ignore")
        noisy = self.backbone.add_noise(latents, draw.noise, draw.timesteps)
        with torch.set_grad_enabled(self.tunes and torch.is_grad_enabled()):
            return self.backbone.features(noisy, draw.timesteps, text, self.taps), text

    def _positive(self, batch: Batch, latents: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Score and denoising loss of the one pass that goes to the end."""
        text = self.backbone.encode_text(batch.captions, "ignore")
        noisy = self.backbone.add_noise(latents, draw.noise, draw.timesteps)
        prediction, features = self.backbone.predict(noisy, draw.timesteps, text, self.taps)
        score = match_score(self.adapter(features), text.pooled)
        return score, denoise_loss(prediction, self.backbone.target(latents, draw.noise, draw.timesteps))
