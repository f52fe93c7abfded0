"""DETR's post-norm transformer, batch first: an encoder over the feature map, a decoder from learned queries.

Positions (here also the timestep) are added to the queries and keys of attention, never to the values
(models/transformer.py of facebookresearch/detr). Module names follow that file, which makes the released weights
easy to place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpt_t2i.adapter.dropout import Dropout, dropout


def attend(attention: nn.MultiheadAttention, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What `attention(queries, keys, values)[0]` gives, without the module's way through sequence-first layouts.

    Args:
        queries: `[B, Q, d]`, or `[1, Q, d]` where all images ask the same, which is then projected once.
        keys, values: `[B, N, d]`.

    Returns:
        `[B, Q, d]`.
    """
    parts = zip(
        (queries, keys, values), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
    )
    query, key, value = (
        F.linear(states, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for states, weight, bias in parts
    )  # [B, heads, Q | N, d / heads]
    query = query.expand(len(key), -1, -1, -1)
    drops = attention.dropout if attention.training else 0.0
    if drops and query.device.type == "cpu":  # where PyTorch has no kernel for it but does these products one by one
        shares = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
        attended = dropout(shares, drops, True) @ value
    else:
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=drops)
    result: Tensor = attention.out_proj(attended.transpose(1, 2).flatten(2))
    return result


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, source: Tensor, positions: Tensor) -> Tensor:
        """`source`, `positions`: `[B, N, d]` -> `[B, N, d]`."""
        located = source + positions
        attended = attend(self.self_attn, located, located, source)
        source = self.norm1(source + self.dropout(attended))
        update = self.linear2(self.dropout(F.relu(self.linear1(source))))
        result: Tensor = self.norm2(source + self.dropout(update))
        return result


class DecoderLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, target: Tensor, memory: Tensor, positions: Tensor, queries: Tensor, read: int | None = None
    ) -> Tensor:
        """`target`, `queries`: `[B, Q, d]` or `[1, Q, d]`; `memory`, `positions`: `[B, N, d]` -> `[B, Q, d]`.

        With `read` only the first `read` queries are worked out, `[B, read, d]`; they attend to all Q as before.
        """
        located = target + queries
        attended = attend(self.self_attn, located[:, :read], located, target)
        target, queries = target[:, :read], queries[:, :read]
        target = self.norm1(target + self.dropout(attended))
        attended = attend(self.multihead_attn, target + queries, memory + positions, memory)
        target = self.norm2(target + self.dropout(attended))
        update = self.linear2(self.dropout(F.relu(self.linear1(target))))
        result: Tensor = self.norm3(target + self.dropout(update))
        return result


class Transformer(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, dim_feedforward: int, enc_layers: int, dec_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        sizes = (dim, num_heads, dim_feedforward, dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(enc_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*sizes) for _ in range(dec_layers))
        self.norm = nn.LayerNorm(dim)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, source: Tensor, positions: Tensor, queries: Tensor, read: int | None = None) -> Tensor:
        """Read a map with learned queries.

        Args:
            source: `[B, N, d]` features of the N = h * w places.
            positions: `[B, N, d]` what is known of each place and of the timestep.
            queries: `[Q, d]`.
            read: how many of the first queries are wanted; None = all. The others then cost nothing in the last layer.

        Returns:
            `[B, Q, d]` or `[B, read, d]`, the last decoder layer's normalised states.
        """
        for layer in self.encoder:
            source = layer(source, positions)
        # The queries tell no image from another before they have looked at one. Dropout does.
        alike = not (self.training and self.dropout)
        queries = queries.expand(1 if alike else len(source), -1, -1)
        target = torch.zeros_like(queries, dtype=source.dtype)
        *inner, last = self.decoder
        for layer in inner:
            target = layer(target, source, positions, queries)
        target = last(target, source, positions, queries, read)
        result: Tensor = self.norm(target)
        return result
