"""The adapter that a run goes on from: one of ours, or the one inside a checkpoint of the authors' release."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.adapter.grounding_text import save_tuned_grounding_text
from dpt_t2i.adapter.io import CONFIG, adapter_folder, load_adapter, read_adapter_card
from dpt_t2i.adapter.model import DiscriminativeAdapter, tap_text
from dpt_t2i.adapter.official import adapter_from_official, sort_official
from dpt_t2i.adapter.official_file import NAMES, read_official
from dpt_t2i.backbones.fingerprint import tensors_hash
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.taps import parse_fusion
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import AdapterConfig
from dpt_t2i.errors import InputError
from dpt_t2i.training.official import text_width

SOURCE = "source.txt"  # beside a kept caption encoder
PAPERS_TAP = "up1"
RELEASED_TEXT = "roberta-base"  # the caption encoder that the release reads expressions with

log = logging.getLogger(__name__)


def tap_of_start(source: str | None) -> str:
    """The tap where the config names none: of our adapter to start from its own, else the paper's.

    Raises:
        InputError: `source` names no adapter.
    """
    if source in (None, "none") or _released_file(Path(source)) is not None:
        return PAPERS_TAP
    card = read_adapter_card(Path(source))
    return tap_text(card["tap_channels"], card["adapter"].get("fusion_channels"), card["adapter"].get("fusion_size"))


def restore_start(
    source: str,
    backbone: Backbone,
    taps: tuple[Tap, ...],
    settings: AdapterConfig,
    fusion: tuple[int, int] | None = None,
    keep: Path | None = None,
) -> tuple[DiscriminativeAdapter, dict[str, Any]]:
    """Everything learned, `logit_scale` included, and the metadata that came with it.

    Args:
        source: an adapter folder, a run folder or checkpoint that holds one, the release's `pytorch_model.bin` (newer
            accelerate: `model.safetensors`), or the folder that holds that.
        taps, fusion: what the config's tap names (`parse_taps`, `parse_fusion`).
        settings: of a released checkpoint, what no tensor's shape tells: heads, matching queries, caption encoder.
        keep: folder for the caption encoder that a released checkpoint has tuned; it goes along with the adapter then.

    Raises:
        InputError: nothing there, damaged, or made for another model or tap; or a tuned caption encoder without a
            place, or without the encoder that it started from.
    """
    released = _released_file(Path(source))
    if released is not None:
        return _from_release(released, taps, fusion, settings, keep), {"imported": released.name}
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
    if adapter_folder(path) != path or (path / CONFIG).is_file():
        return None  # one of ours
    return next((path / name for name in NAMES if (path / name).is_file()), None)


def _from_release(
    file: Path, taps: tuple[Tap, ...], fusion: tuple[int, int] | None, settings: AdapterConfig, keep: Path | None
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
        text_dim=text_width(parts, text),
    )
    if parts.lora:
        log.warning(
            "%s: the adapter is taken, %d tensors of the denoiser's LoRA are left; dpt import-official takes all",
            file.name, len(parts.lora),
        )  # fmt: skip
    if parts.grounding_text:
        _keep_caption_encoder(adapter, parts.grounding_text, text, file, keep)
    return adapter


def _keep_caption_encoder(
    adapter: DiscriminativeAdapter, state: Mapping[str, Tensor], start: str, file: Path, keep: Path | None
) -> None:
    """The tuned encoder as a folder of its own, which the adapter names and takes along wherever it is saved."""
    if keep is None or not (_is_kept(state, start, keep) or _write_whole(state, start, keep)):
        raise InputError(
            f"{file} holds a tuned caption encoder, which is complete with `{start}` alone, and that is not here; name "
            "its folder with --grounding_text"
        )
    adapter.own_text = keep.resolve()
    adapter.config = adapter.config.model_copy(update={"grounding_text": str(adapter.own_text)})


def _source_of(state: Mapping[str, Tensor], start: str) -> str:
    """What a kept encoder was made of: the encoder that it started from, and a hash of the tuned tensors."""
    return f"{start} {tensors_hash(state)}\n"


def _is_kept(state: Mapping[str, Tensor], start: str, folder: Path) -> bool:
    """Whether `folder` holds this very encoder; an earlier run there may have started from another checkpoint."""
    source = folder / SOURCE
    return source.is_file() and source.read_text(encoding="utf-8") == _source_of(state, start)


def _write_whole(state: Mapping[str, Tensor], start: str, folder: Path) -> bool:
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    whole = save_tuned_grounding_text(state, start, unfinished)
    if whole:
        (unfinished / SOURCE).write_text(_source_of(state, start), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    else:
        shutil.rmtree(unfinished)
    return whole
