"""What is read off the queries: a matching vector, and everything that grounds a phrase in a box."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them: `mlp(d, d, 4)` has two."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class GroundingHeads(nn.Module):
    """MDETR's heads (Kamath et al., ICCV 2021): soft-token classes, boxes and the contrastive alignment."""

    def __init__(self, dim: int, num_token_classes: int, align_dim: int, text_dim: int) -> None:
        super().__init__()
        self.token_classifier = nn.Linear(dim, num_token_classes + 1)
        self.box = mlp(dim, dim, dim, 4)
        self.query_align = nn.Linear(dim, align_dim)
        self.token_align = nn.Linear(text_dim, align_dim)

    def logits(self, queries: Tensor) -> Tensor:
        """`[B, Q, d]` -> `[B, Q, K + 1]`; the last class is "no object"."""
        result: Tensor = self.token_classifier(queries)
        return result

    def boxes(self, queries: Tensor) -> Tensor:
        """`[B, Q, d]` -> `[B, Q, 4]` cxcywh in [0, 1]."""
        result: Tensor = self.box(queries).sigmoid()
        return result

    def align_queries(self, queries: Tensor) -> Tensor:
        """`[B, Q, d]` -> `[B, Q, A]` of length 1."""
        return F.normalize(self.query_align(queries), dim=-1)

    def align_tokens(self, tokens: Tensor) -> Tensor:
        """`[B, L, text_dim]` -> `[B, L, A]` of length 1."""
        return F.normalize(self.token_align(tokens.to(self.token_align.weight.dtype)), dim=-1)
