"""Image-text matching: tell the true caption from two others, and the true image from two others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def itm_loss(
    scores_i2t: Tensor,
    scores_t2i: Tensor,
    logit_scale: Tensor,
    mask_i2t: Tensor | None = None,
    mask_t2i: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross entropy on `logit_scale * s`, in float32, both ways, averaged over the batch.

    Args:
        scores_i2t: `[B, 3]` matching scores of the image with its caption, a hard negative and a random one.
        scores_t2i: `[B, 3]` matching scores of the caption with its image, a hard negative and a random one.
        logit_scale: `[]` or `[B, 1]` positive factor: `AdapterOutput.logit_scale`, which is exp-ed and at most 100.
        mask_i2t: `[B, 3]` bool, False where a candidate does not exist (its score may be anything, NaN too);
            column 0 must be True. None: all exist. An example with no negative at all has loss 0.
        mask_t2i: the same of `scores_t2i`.

    Returns:
        `loss_i2t` and `loss_t2i`, each `[]`.
    """
    return {
        "loss_i2t": _first_of(scores_i2t, logit_scale, mask_i2t),
        "loss_t2i": _first_of(scores_t2i, logit_scale, mask_t2i),
    }


def _first_of(scores: Tensor, logit_scale: Tensor, mask: Tensor | None) -> Tensor:
    logits = scores.float() * logit_scale.float()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    positive = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, positive)
