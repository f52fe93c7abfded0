"""The adapter that a run goes on from: one of ours, or the one inside a checkpoint of the authors' release."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.official import adapter_from_official
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError

RELEASED_FILE = "pytorch_model.bin"
RELEASED_TEXT = "roberta-base"  # the caption encoder that the release reads expressions with

log = logging.getLogger(__name__)


def restore_start(
    source: str, backbone: Backbone, taps: tuple[Tap, ...], settings: AdapterConfig
) -> tuple[DiscriminativeAdapter, dict[str, Any]]:
    """Everything learned, `logit_scale` included, and the metadata that came with it.

    Args:
        source: an adapter folder, a run folder or checkpoint that holds one, the release's `pytorch_model.bin`, or the
            folder that holds that.
        settings: of a released checkpoint, what no tensor's shape tells: heads, matching queries, caption encoder.

    Raises:
        InputError: nothing there, damaged, or made for another model or tap.
    """
    released = _released_file(Path(source))
    if released is not None:
        return _from_release(released, taps, settings), {"imported": released.name}
    adapter, metadata = load_adapter(Path(source), torch.device("cpu"), backbone.fingerprint())
    if list(adapter.tap_channels) != [tap.name for tap in taps]:
        raise InputError(
            f"adapter {source} reads tap `{'_'.join(adapter.tap_channels)}`, the config says "
            f"`{'_'.join(tap.name for tap in taps)}`; set tap to the adapter's"
        )
    return adapter, metadata


def _released_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    return path / RELEASED_FILE if (path / RELEASED_FILE).is_file() else None


def _from_release(file: Path, taps: tuple[Tap, ...], settings: AdapterConfig) -> DiscriminativeAdapter:
    text = RELEASED_TEXT if settings.grounding_text == "denoiser" else settings.grounding_text
    adapter, table = adapter_from_official(
        _read_pickle(file),
        {tap.name: tap.channels for tap in taps},
        num_heads=settings.num_heads,
        num_queries_matching=settings.num_queries_matching,
        grounding_text=text,
    )
    left = sum(row.action == "ignored" for row in table)
    if left:
        log.warning("%s: the adapter is taken, %d tensors of the denoiser's LoRA are left", file.name, left)
    return adapter


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors by name; a pickle that wants to run code is refused."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{file} is no whole checkpoint of tensors ({reason}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file} holds no tensors by name; give the release's {RELEASED_FILE}")
    return dict(state)
