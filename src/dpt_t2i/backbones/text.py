"""Prompts to token ids for CLIP-like encoders, and what pipelines do not tell: what is cut, and where EOS is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.backbones.interface import OnTruncate
from dpt_t2i.errors import InputError

TOLD = 200  # characters of a text that a message shows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenized:
    ids: Tensor  # [B, L] long, padded to the encoder's full length
    eos: Tensor  # [B] long, position of the first EOS
    mask: Tensor  # [B, L] bool, True up to and including EOS


def token_limit(tokenizer: Any, text_encoder: Any) -> int:
    """L: tokens of one text, BOS and EOS included. A tokenizer without a limit of its own states a huge number."""
    return min(int(tokenizer.model_max_length), int(text_encoder.config.max_position_embeddings))


def tokenize(tokenizer: Any, texts: Sequence[str], limit: int, on_truncate: OnTruncate) -> Tokenized:
    """Pad or cut `texts` to `limit` tokens.

    EOS is looked for by the tokenizer's own id. Text configs often state another (49407 for a small vocabulary, or the
    old 2), and then every caption pools to the same vector. The first EOS counts: CLIP pads with EOS too.

    Raises:
        InputError: a text is over the limit and `on_truncate` is `error`; or the tokenizer adds no EOS.
    """
    if on_truncate != "ignore":
        _report_cut(tokenizer, texts, limit, on_truncate)
    batch = tokenizer(list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    is_eos = batch.input_ids == tokenizer.eos_token_id
    if not bool(is_eos.any(dim=1).all()):
        raise InputError(
            f"the tokenizer does not close a text with its EOS token `{tokenizer.eos_token}`; mend its files"
        )
    eos = is_eos.int().argmax(dim=1)
    return Tokenized(batch.input_ids, eos, torch.arange(limit) <= eos[:, None])


def token_offsets(tokenizer: Any, texts: Sequence[str], limit: int) -> list[list[tuple[int, int]]]:
    """For each text the characters `[start, end)` of each of its L token positions; (0, 0) for BOS, EOS and padding."""
    batch = tokenizer(list(texts), padding="max_length", max_length=limit, truncation=True, return_offsets_mapping=True)
    return [[(start, end) for start, end in row] for row in batch["offset_mapping"]]


def _report_cut(tokenizer: Any, texts: Sequence[str], limit: int, on_truncate: OnTruncate) -> None:
    """One message about all the texts that are over the limit, with what the first of them loses."""
    if not texts:
        return
    # `verbose=False`: without it transformers adds a second, vaguer warning.
    offsets = tokenizer(list(texts), return_offsets_mapping=True, verbose=False)["offset_mapping"]
    long = [(text, row) for text, row in zip(texts, offsets, strict=True) if len(row) > limit]
    if not long:
        return
    text, row = long[0]
    first_cut = row[limit - 1][0]  # the last of the `limit` places goes to EOS
    others = f" (and {len(long) - 1} more)" if len(long) > 1 else ""
    lost = shorten(text[first_cut:], TOLD, placeholder=" ...")
    whole = shorten(text, TOLD, placeholder=" ...")
    message = f"prompt over the text encoder's {limit} tokens: cut is `{lost}` of `{whole}`{others}"
    if on_truncate == "error":
        raise InputError(f"{message}; shorten it")
    logger.warning(message)
