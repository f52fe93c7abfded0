"""What the adapter says about a noised image and a text, and where an adapter comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdapterOutput:
    """Everything the heads give for one batch; Q_m matching and Q_g grounding queries."""

    match_embeds: Tensor  # [B, Q_m, P] matching head, to be compared with pooled text by cosine
    logits: Tensor  # [B, Q_g, K + 1] token classifier, K = 255 positions, the last = no object
    boxes: Tensor  # [B, Q_g, 4] cxcywh in [0, 1]
    query_align: Tensor  # [B, Q_g, A] L2-normalised query embeddings of the contrastive alignment
    token_align: Tensor | None  # [B, L, A] L2-normalised token embeddings, None if no text states were given
    logit_scale: Tensor  # [] exp(logit_scale), already clamped to <= 100; [B, 1] where several adapters are stacked
    token_mask: Tensor | None = None  # [B, L] bool, True on real tokens of token_align; None = every token counts

    @staticmethod
    def cat(parts: Sequence[AdapterOutput]) -> AdapterOutput:
        """Stack what adapters of the same sizes say along B; all parts were given text states, and masks or none."""

        def stacked(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        return AdapterOutput(
            match_embeds=stacked("match_embeds"),
            logits=stacked("logits"),
            boxes=stacked("boxes"),
            query_align=stacked("query_align"),
            token_align=stacked("token_align"),
            logit_scale=torch.cat([part.logit_scale.expand(len(part.logits), 1) for part in parts]),
            token_mask=None if parts[0].token_mask is None else stacked("token_mask"),
        )


@dataclass(frozen=True)
class AdapterOrigin:
    """What an adapter was trained on and with."""

    base: Mapping[str, Any]  # fingerprint of the T2I model, with `lora`, the hash of its LoRA (None without one)
    metadata: Mapping[str, Any]  # what the recipe added: its config, the best correction strength
