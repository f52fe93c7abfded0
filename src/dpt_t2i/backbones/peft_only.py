"""Denoisers that diffusers gives no LoRA methods (PixArt's transformer)."""

from __future__ import annotations

from typing import Any

from torch import nn


def has_lora_methods(denoiser: nn.Module) -> bool:
    """Can diffusers itself put a LoRA on this denoiser?"""
    return hasattr(denoiser, "load_lora_adapter")


def remove(denoiser: Any) -> None:
    """Take every LoRA layer out again."""
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(denoiser)
    del denoiser.peft_config
