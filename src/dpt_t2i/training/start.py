"""The adapter that a run goes on from: one of ours, or the one inside a checkpoint of the authors' release."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.official import adapter_from_official, sort_official
from dpt_t2i.adapter.official_file import read_official
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.taps import parse_fusion
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError

RELEASED_FILE = "pytorch_model.bin"
RELEASED_TEXT = "roberta-base"  # the caption encoder that the release reads expressions with

log = logging.getLogger(__name__)


def restore_start(
    source: str,
    backbone: Backbone,
    taps: tuple[Tap, ...],
    settings: AdapterConfig,
    fusion: tuple[int, int] | None = None,
) -> tuple[DiscriminativeAdapter, dict[str, Any]]:
    """Everything learned, `logit_scale` included, and the metadata that came with it.

    Args:
        source: an adapter folder, a run folder or checkpoint that holds one, the release's `pytorch_model.bin`, or the
            folder that holds that.
        taps, fusion: what the config's tap names (`parse_taps`, `parse_fusion`).
        settings: of a released checkpoint, what no tensor's shape tells: heads, matching queries, caption encoder.

    Raises:
        InputError: nothing there, damaged, or made for another model or tap.
    """
    released = _released_file(Path(source))
    if released is not None:
        return _from_release(released, taps, fusion, settings), {"imported": released.name}
    adapter, metadata = load_adapter(Path(source), torch.device("cpu"), backbone.fingerprint())
    names = [tap.name for tap in taps]
    if list(adapter.tap_channels) != names or parse_fusion(adapter.tap_text) != fusion:
        wanted = "_".join(names) + ("-{}-{}".format(*fusion) if fusion else "")
        raise InputError(
            f"adapter {source} reads tap `{adapter.tap_text}`, the config says `{wanted}`; set tap to the adapter's"
        )
    return adapter, metadata


def _released_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    return path / RELEASED_FILE if (path / RELEASED_FILE).is_file() else None


def _from_release(
    file: Path, taps: tuple[Tap, ...], fusion: tuple[int, int] | None, settings: AdapterConfig
) -> DiscriminativeAdapter:
    text = RELEASED_TEXT if settings.grounding_text == "denoiser" else settings.grounding_text
    parts = sort_official(read_official(file))
    adapter, _ = adapter_from_official(
        parts.adapter,
        {tap.name: tap.channels for tap in taps},
        fusion=fusion,
        num_heads=settings.num_heads,
        num_queries_matching=settings.num_queries_matching,
        grounding_text=text,
    )
    for what, left in (("the denoiser's LoRA", parts.lora), ("its tuned caption encoder", parts.grounding_text)):
        if left:
            log.warning(
                "%s: the adapter is taken, %d tensors of %s are left; dpt import-official takes all",
                file.name, len(left), what,
            )  # fmt: skip
    return adapter
