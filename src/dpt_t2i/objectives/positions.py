"""Which tokens name a box: character spans of a text -> rows over token positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpt_t2i.errors import InputError

Span = tuple[int, int]  # [start, end) in characters


def positive_map(
    offsets: Sequence[Span],
    spans_of_boxes: Sequence[Sequence[Span]],
    num_token_classes: int = 255,
) -> Tensor:
    """Rows of the soft-token target of one text, one a box.

    A span reaches from the token of its first character to the token of its last; a character that is cut into several
    tokens is its first one's, as the release's `char_to_token` has it. Spaces belong to no token, so a span may begin
    or end on one (the release then asked the tokenizer about another text of the batch).

    Args:
        offsets: character range of each of the text's tokens, from a fast tokenizer's `offset_mapping`; special and
            padding tokens have empty ranges.
        spans_of_boxes: for each of n boxes the spans that name it.
        num_token_classes: K; tokens from position K on have no class.

    Returns:
        `[n, K + 1]` float32.

    Raises:
        InputError: the spans of a box touch none of the first K tokens.
    """
    rows = torch.zeros(len(spans_of_boxes), num_token_classes + 1)
    for row, spans in zip(rows, spans_of_boxes, strict=True):
        for span in spans:
            touched = [i for i, token in enumerate(offsets[:num_token_classes]) if _overlap(token, span)]
            if touched:
                end = max(min(offsets[i][1], span[1]) for i in touched)
                last = next(i for i in touched if offsets[i][0] < end <= offsets[i][1])
                row[touched[0] : last + 1] = 1.0
        if not row.any():
            raise InputError(
                f"spans {[tuple(span) for span in spans]} touch no token: they are empty, hold only spaces or lie "
                "beyond the text encoder's last token; mend the spans or shorten the expression"
            )
    return rows / rows.sum(dim=1, keepdim=True)


def _overlap(first: Span, second: Span) -> bool:
    return max(first[0], second[0]) < min(first[1], second[1])
