"""LoRA on a denoiser that diffusers gives no LoRA methods (PixArt's transformer): the same steps by PEFT alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn


def has_lora_methods(denoiser: nn.Module) -> bool:
    """Can diffusers itself put a LoRA on this denoiser?"""
    return hasattr(denoiser, "load_lora_adapter")


def remove(denoiser: Any) -> None:
    """Take every LoRA layer out again."""
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(denoiser)
    del denoiser.peft_config


def inject_for(
    denoiser: nn.Module, state: Mapping[str, Tensor], described: Mapping[str, Any] | None, prefix: str, name: str
) -> None:
    """Put an empty LoRA where `state` has one.

    Args:
        state: PEFT-named tensors.
        described: PEFT's config as a LoRA file's header tells it, its keys behind `prefix`. Without it each module's
            rank is that of its tensor, and the scale is 1.
    """
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in state.items() if ".lora_A." in key}
    settings = {key.removeprefix(f"{prefix}."): value for key, value in (described or {}).items()}
    common = settings.get("r", next(iter(ranks.values())))
    pattern = {f"^{re.escape(module)}$": rank for module, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=settings.get("lora_alpha", common),
        use_rslora=settings.get("use_rslora", False),
        rank_pattern=pattern,
        alpha_pattern=settings.get("alpha_pattern", {}) if described else pattern,
        target_modules=list(ranks),
    )
    inject_adapter_in_model(config, denoiser, name)
