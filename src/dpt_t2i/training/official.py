"""`dpt import-official`: a checkpoint of the authors' release -> the files of a run of ours.

adapter/                              the adapter; with a tuned RoBERTa also adapter/grounding_text/
pytorch_lora_weights.safetensors      the LoRA; a stage-1 checkpoint has none
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dpt_t2i.adapter.grounding_text import save_tuned_grounding_text
from dpt_t2i.adapter.io import OWN_GROUNDING_TEXT, save_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.official import ROBERTA_WIDTH, OfficialKey, OfficialParts, adapter_from_official, sort_official
from dpt_t2i.adapter.official_file import read_official
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import load_backbone, read_json
from dpt_t2i.backbones.lora import LORA_FILE, PROJECTIONS, lora_parameters, place_lora, save_lora
from dpt_t2i.backbones.taps import parse_fusion
from dpt_t2i.config import ImportOfficialConfig
from dpt_t2i.errors import InputError

ADAPTER = "adapter"
ENCODER_KEY = "text_encoder.*"


def run_import(config: ImportOfficialConfig, checkpoint: Path) -> dict[str, Any]:
    """Import, and account for every key.

    Returns:
        `stage` (1: no LoRA; 2), `adapter` and `lora` (paths, `lora` None in stage 1), `counts` of the actions, `table`
        (`key action note` of each key, `taken`, `ignored` or `missing`), `summary`.

    Raises:
        InputError: the checkpoint cannot be read, holds a key or shape that nothing here knows, or is of another base.
            Nothing is written then.
    """
    parts = sort_official(read_official(checkpoint))
    if parts.lora and not parts.adapter:
        raise InputError(
            f"checkpoint {checkpoint} holds the denoiser's LoRA alone (the release's --only_train_lora) and no "
            "adapter; give one that stage 2 wrote with both"
        )
    backbone = load_backbone(config.pretrained_model_name_or_path, config.revision, config.device)
    _check_base(parts, backbone)
    adapter, table = _adapter(parts, backbone, config)
    if parts.lora:
        place_lora(backbone, parts.lora, str(checkpoint))
    elif (config.output_dir / LORA_FILE).exists():
        raise InputError(f"{config.output_dir} holds a LoRA, this stage-1 checkpoint has none; give another output_dir")
    origin = {"file": checkpoint.name, "sha256": _digest(parts), "tap": adapter.tap_text}
    rows = [*table, *_lora_rows(parts, backbone), *_ignored_rows(parts)]
    rows += _write_adapter(adapter, parts, backbone, config, {"imported_from": origin})
    if parts.lora:
        save_lora(backbone, config.output_dir, {"imported_from": origin})
    return _report(rows, bool(parts.lora), config, adapter)


def _check_base(parts: OfficialParts, backbone: Backbone) -> None:
    """The widths that a person can read: which Stable Diffusion the checkpoint was trained on."""
    if backbone.denoiser_key != "unet":
        raise InputError(f"the release knows Stable Diffusion 1 and 2 only; base `{backbone.name}` has no U-Net")
    head = parts.adapter.get("map_to_clip.2.weight")
    if head is not None and head.ndim == 2 and head.shape[0] != backbone.pooled_dim:
        raise InputError(
            f"the checkpoint was trained on a base whose text is {head.shape[0]} wide (768: SD 1.x, 1024: SD 2.x), "
            f"`{backbone.name}` has {backbone.pooled_dim}; give its own base"
        )


def _adapter(
    parts: OfficialParts, backbone: Backbone, config: ImportOfficialConfig
) -> tuple[DiscriminativeAdapter, tuple[OfficialKey, ...]]:
    channels = {tap.name: tap.channels for tap in backbone.parse_taps(config.tap)}
    _check_tap(parts.adapter, channels, backbone, config.tap)
    return adapter_from_official(
        parts.adapter,
        channels,
        fusion=parse_fusion(config.tap),
        num_heads=config.num_heads,
        num_queries_matching=config.num_queries_matching,
        grounding_text=_named_encoder(config.grounding_text),
        text_dim=text_width(parts, config.grounding_text),
    )


def text_width(parts: OfficialParts, name: str) -> int:
    """Of the caption encoder's states: the tuned one's, that of the folder that is named, or RoBERTa-base's."""
    if (words := parts.grounding_text.get("embeddings.word_embeddings.weight")) is not None:
        return int(words.shape[-1])
    config = Path(name) / "config.json"
    return int(read_json(config).get("hidden_size", ROBERTA_WIDTH)) if config.is_file() else ROBERTA_WIDTH


def _check_tap(state: Mapping[str, Tensor], channels: Mapping[str, int], backbone: Backbone, tap: str) -> None:
    """A projection of other channels is another tap's: say which would fit."""
    projection = state.get("input_proj.weight")
    fused = parse_fusion(tap) or any(key.startswith("fusion_proj.") for key in state)
    if fused or projection is None or projection.ndim != 4 or projection.shape[1] == sum(channels.values()):
        return
    width = projection.shape[1]
    fitting = [name for name, one in backbone.taps.items() if one.channels == width]
    hint = f"taps of that width: {', '.join(fitting)}" if fitting else "it was trained on several taps or another base"
    raise InputError(
        f"the checkpoint's projection takes {width} channels, tap {tap} of `{backbone.name}` gives "
        f"{sum(channels.values())}; {hint}; set --tap"
    )


def _named_encoder(name: str) -> str:
    """A folder by its full path, so that the adapter may be used from anywhere; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _write_adapter(
    adapter: DiscriminativeAdapter,
    parts: OfficialParts,
    backbone: Backbone,
    config: ImportOfficialConfig,
    metadata: Mapping[str, Any],
) -> list[OfficialKey]:
    """Write the folder, the tuned caption encoder inside it; rows of the table about that encoder."""
    folder, frozen_from = config.output_dir / ADAPTER, adapter.config.grounding_text
    rows = [OfficialKey(ENCODER_KEY, "missing", f"frozen while training: `{frozen_from}` is loaded by its name")]
    if parts.grounding_text:
        whole = save_tuned_grounding_text(parts.grounding_text, frozen_from, folder / OWN_GROUNDING_TEXT)
        note = f"{ADAPTER}/grounding_text" + (
            "" if whole else f", weights only: `{frozen_from}` is not here to complete it"
        )
        rows = [OfficialKey(f"text_encoder.{key}", "taken", note) for key in parts.grounding_text]
        adapter.config = adapter.config.model_copy(update={"grounding_text": OWN_GROUNDING_TEXT})
    save_adapter(adapter, folder, base_fingerprint=backbone.fingerprint(), metadata=metadata)
    return rows


def _lora_rows(parts: OfficialParts, backbone: Backbone) -> list[OfficialKey]:
    if not parts.lora:
        return [OfficialKey("unet.*_lora.*", "missing", "a stage-1 checkpoint: the denoiser is the plain base")]
    rows = [OfficialKey(key, "taken", LORA_FILE) for key in parts.lora]
    adapted = {name.partition(".lora_")[0] for name, _ in backbone.denoiser.named_parameters() if ".lora_" in name}
    assert 2 * len(adapted) == len(parts.lora) == len(lora_parameters(backbone))
    names = {name.removesuffix(".base_layer") for name, _ in backbone.denoiser.named_modules()}
    plain = sorted(name for name in names if name.endswith(PROJECTIONS) and name not in adapted)
    return rows + [OfficialKey(f"unet.{name}", "missing", "no LoRA: stays as in the base") for name in plain]


def _ignored_rows(parts: OfficialParts) -> list[OfficialKey]:
    return [OfficialKey(key, "ignored", "a counter, nothing learned") for key in parts.buffers]


def _digest(parts: OfficialParts) -> str:
    """16 hex digits of everything learned, so that two imports can be told apart."""
    digest = hashlib.sha256()
    for part in (parts.adapter, parts.lora, parts.grounding_text):
        for key in sorted(part):
            digest.update(key.encode())
            digest.update(part[key].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _report(
    rows: Sequence[OfficialKey], has_lora: bool, config: ImportOfficialConfig, adapter: DiscriminativeAdapter
) -> dict[str, Any]:
    counts = Counter(row.action for row in rows)
    width = max(len(row.key) for row in rows)
    summary = [f"{row.action:<8} {row.key:<{width}}  {row.note}" for row in rows]
    summary.append(f"{counts['taken']} taken, {counts['ignored']} ignored, {counts['missing']} missing")
    summary.append(
        f"tap {adapter.tap_text}, {adapter.config.num_heads} heads, {adapter.config.num_queries_matching} matching "
        "queries: no checkpoint tells these; set --tap, --num_heads, --num_queries_matching if it was trained otherwise"
    )
    lora = config.output_dir / LORA_FILE if has_lora else None
    return {
        "stage": 2 if has_lora else 1,
        "adapter": str(config.output_dir / ADAPTER),
        "lora": str(lora) if lora else None,
        "counts": {action: counts[action] for action in ("taken", "ignored", "missing")},
        "table": [asdict(row) for row in rows],
        "summary": summary,
    }
