"""A frozen encoder of grounding expressions other than the T2I model's own: RoBERTa in the paper.

With `grounding_text: denoiser` nothing here is used: the token states are those that condition the denoiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dpt_t2i.errors import InputError


@dataclass(frozen=True)
class GroundingText:
    """Token states of B expressions, and where each token lies in its text."""

    tokens: Tensor  # [B, L, D] last hidden states
    mask: Tensor  # [B, L] bool, True on real tokens (the two special ones included)
    offsets: tuple[tuple[tuple[int, int], ...], ...]  # [B][L] character range [start, end) of each token


class GroundingTextEncoder(nn.Module):
    """A transformers encoder with its fast tokenizer; takes no gradient and never leaves eval mode."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, text_dim: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.text_dim = text_dim  # D

    def train(self, mode: bool = True) -> GroundingTextEncoder:
        """Stay in eval mode: a training loop's `.train()` must not bring the dropout of a frozen encoder back."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> GroundingText:
        """Encode B expressions, padded to the longest; longer ones than the encoder takes are cut."""
        batch = self.tokenizer(
            list(texts), padding="longest", truncation=True, return_offsets_mapping=True, return_tensors="pt"
        )
        device = next(self.encoder.parameters()).device
        mask = batch["attention_mask"].to(device)
        states = self.encoder(input_ids=batch["input_ids"].to(device), attention_mask=mask).last_hidden_state
        offsets = tuple(tuple((start, end) for start, end in text) for text in batch["offset_mapping"].tolist())
        return GroundingText(tokens=states, mask=mask.bool(), offsets=offsets)


def load_grounding_text(
    name_or_path: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> GroundingTextEncoder:
    """Load the encoder that `adapter.grounding_text` names: a folder or a hub id such as `roberta-base`.

    Raises:
        InputError: nothing loadable there, or its tokenizer cannot say where a token lies in the text.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        encoder = AutoModel.from_pretrained(name_or_path, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"cannot load grounding_text `{name_or_path}`: {reason}; give a RoBERTa folder, a hub id or `denoiser`"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"grounding_text `{name_or_path}` has no fast tokenizer, so spans cannot be placed on tokens")
    return GroundingTextEncoder(encoder.to(device), tokenizer, text_dim=encoder.config.hidden_size)


def save_tuned_grounding_text(state: Mapping[str, Tensor], trained_from: str, folder: Path) -> bool:
    """Write a tuned encoder as a folder that `load_grounding_text` reads.

    Args:
        state: its weights under transformers' own names.
        trained_from: folder or hub id of the encoder that it started from, which gives sizes and tokenizer.

    Returns:
        False where `trained_from` is not to be had: the weights are written all the same, alone.

    Raises:
        InputError: the weights are not those of such an encoder.
    """
    try:
        start = load_grounding_text(trained_from, torch.device("cpu"))
    except InputError:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
        return False
    wanted = start.encoder.state_dict()
    for key in sorted({*wanted, *state}):
        shapes = tuple(tuple(table[key].shape) if key in table else "nothing" for table in (state, wanted))
        if shapes[0] != shapes[1] and key not in ("embeddings.position_ids", "embeddings.token_type_ids"):
            raise InputError(
                f"tuned grounding encoder: `{key}` is {shapes[0]} in the checkpoint, {shapes[1]} in `{trained_from}`; "
                "name the encoder that it was trained from"
            )
    start.encoder.load_state_dict(dict(state), strict=False)
    encoder: Any = start.encoder
    encoder.save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    return True
