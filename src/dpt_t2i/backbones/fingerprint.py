"""What base a LoRA or an adapter was made for, and whether it fits the one at hand."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpt_t2i.errors import InputError

logger = logging.getLogger(__name__)


def weights_hash(module: nn.Module) -> str:
    """16 hex digits of the weights of `module` under its LoRA, if any.

    Values are rounded to bfloat16 first, so that the same checkpoint has one hash, loaded in float32 or bfloat16.
    """
    state = module.state_dict()
    plain = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    return _hash(plain, torch.bfloat16)


def lora_hash(module: nn.Module) -> str | None:
    """16 hex digits of the LoRA on `module`, exact; None without one."""
    state = {key: value for key, value in module.state_dict().items() if ".lora_" in key}
    return _hash(state, torch.float32) if state else None


def check_fingerprint(made_for: Mapping[str, Any], actual: Mapping[str, Any], what: str) -> None:
    """Compare two `Backbone.fingerprint()`s; `what` names the artifact in the message.

    Another architecture cannot work; other weights of the same one (a fine-tune) can, less well: a warning.

    Raises:
        InputError: the architectures differ; names both bases and the first differing entry.
    """
    theirs, ours = made_for["architecture"], actual["architecture"]
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise InputError(
                f"{what} was made for base `{made_for['name']}` ({key} {theirs.get(key)}), "
                f"not for `{actual['name']}` ({key} {ours.get(key)}); load that base or give an artifact of this one"
            )
    if made_for["weights"] != actual["weights"]:
        logger.warning(
            "%s was made for base `%s` (weights %s); `%s` has the same architecture but other weights (%s)",
            what, made_for["name"], made_for["weights"], actual["name"], actual["weights"],
        )  # fmt: skip


def _hash(state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
