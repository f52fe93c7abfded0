"""The one score. The loss, the evaluation, the correction and the search all call it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dpt_t2i.adapter.types import AdapterOutput


def match_score(output: AdapterOutput | Tensor, pooled: Tensor) -> Tensor:
    """How well the noised images match the texts: `s = max_q cos(head(q), p(y))` over the matching queries.

    Args:
        output: of the adapter, or its `match_embeds` `[B, Q_m, P]` alone, for B images that were denoised under the
            very texts being judged.
        pooled: `[B, P]` pooled vectors p(y) of those texts, unnormalised.

    Returns:
        `[B]` float32 in [-1, 1], differentiable. A product and a sum, not a matrix product: autocast leaves them in
        float32.
    """
    embeds = output if isinstance(output, Tensor) else output.match_embeds
    queries = F.normalize(embeds.float(), dim=-1)  # [B, Q_m, P]
    texts = F.normalize(pooled.float(), dim=-1)
    return (queries * texts[:, None]).sum(dim=-1).max(dim=-1).values
