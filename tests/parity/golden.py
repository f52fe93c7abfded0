"""Where the large goldens lie, and the tiny released model behind our own doors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.official import OfficialParts, adapter_from_official, sort_official
from dpt_t2i.adapter.official_file import read_official
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import place_lora, remove_lora
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.backbones.taps import parse_fusion

SHARED = Path(__file__).resolve().parents[3] / "shared" / "parity"
needs_shared = pytest.mark.skipif(
    not (SHARED / "sd" / "model_index.json").is_file(),
    reason=f"the release's tiny model and its large goldens are not here ({SHARED.name} beside the repository)",
)
HEADS = 4  # of the goldens' adapter: `--nheads 4`


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """`features` -> features/features.safetensors."""
    return load_file(SHARED / name / f"{name}.safetensors")


@cache
def numbers(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SHARED / name / f"{name}.json").read_text(encoding="utf-8"))
    return found


@cache
def checkpoint() -> OfficialParts:
    return sort_official(read_official(SHARED / "checkpoint"))


@cache
def model() -> StableDiffusionBackbone:
    """The tiny SD 1.4-shaped model, one for all tests; with or without LoRA, as `backbone` last left it."""
    return load_backbone(SHARED / "sd", device="cpu")


def backbone(lora: bool) -> StableDiffusionBackbone:
    """The tiny model with the golden LoRA put on, or taken off."""
    if lora:
        place_lora(model(), checkpoint().lora, "golden")
    else:
        remove_lora(model())
    return model()


def adapter(tap: str = "up1", own: dict[str, Tensor] | None = None) -> DiscriminativeAdapter:
    """The golden adapter as the importer builds it; `own` replaces tensors of the checkpoint."""
    taps = model().parse_taps(tap)
    state = {key: value.clone() for key, value in (checkpoint().adapter | (own or {})).items()}  # a test may train it
    channels = {one.name: one.channels for one in taps}
    return adapter_from_official(state, channels, fusion=parse_fusion(tap), num_heads=HEADS)[0]


def close(ours: Tensor, golden: Tensor, relative: float = 1e-4) -> None:
    """Equal within `relative` of the golden's own scale (its largest number), and of each number."""
    scale = float(golden.abs().max())
    torch.testing.assert_close(ours.float(), golden.float(), rtol=relative, atol=relative * scale)
