"""`dpt export`: what was learned, in the files that diffusers, ComfyUI and A1111 load, and a card that says so."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dpt_t2i.backbones.fingerprint import check_fingerprint, part_hashes, weights_hash
from dpt_t2i.backbones.loading import DTYPES, SAMPLING, choose_artifacts, read_pipeline
from dpt_t2i.backbones.lora import LORA_FILE, diffusers_reader, lora_file, lora_metadata
from dpt_t2i.backbones.lora_files import DIFFUSERS_HEADER_KEY, HEADER_KEY, LoraFile, LoraLayer, read_lora
from dpt_t2i.config import ExportConfig
from dpt_t2i.errors import InputError
from dpt_t2i.files import file_hash, in_one_move, write_text
from dpt_t2i.publish.base_model import BaseModel, look_at_base
from dpt_t2i.publish.kohya import kohya_header, kohya_tensors, refuse_dit
from dpt_t2i.publish.model_card import check_card_place, read_measured, write_export_card
from dpt_t2i.publish.privacy import public

STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by safetensors' names
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "config.json", "model.safetensors"

log = logging.getLogger(__name__)


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Write the LoRA in the asked format, its adapter beside it, and `README.md`.

    Raises:
        InputError: no LoRA to export, one of another family or rank, a format that the family does not have, figures
            of other weights, or an output folder that must not be written or holds another LoRA.
    """
    model, folder = config.model, config.output_dir
    check_card_place(folder)
    if config.format != "merged" and model.dtype != "float32":
        raise InputError(f"dtype {model.dtype} is for --format merged; LoRA files keep the dtype that they have")
    base = look_at_base(model.pretrained_model_name_or_path, model.revision)
    if config.format == "kohya":
        refuse_dit(base)
    measured = {name: read_measured(file, name) for name, file in _measured_files(config).items() if file is not None}
    chosen, adapter = choose_artifacts(model.pretrained_model_name_or_path, model.lora, model.adapter, model.revision)
    if chosen is None:
        raise InputError(f"there is no LoRA to export: base `{base.name}` ships none; give --lora")
    if adapter is not None:
        inner = adapter / "adapter"  # where a run folder has it
        adapter = adapter if (adapter / ADAPTER_CONFIG).is_file() or not inner.is_dir() else inner
        _adapter_card(adapter)  # refused before anything is written
    _check_measured(measured, lora_file(chosen), adapter)
    lora = read_lora(
        lora_file(chosen),
        {base.denoiser_key: base.denoiser},
        base.name,
        diffusers_reader(base.lora_reader(), base.denoiser),
    )
    _check_base(lora, base)
    if base.denoiser_key == "transformer" and config.format == "diffusers":
        lora = with_alpha_inside(lora)
    title = config.title or f"{base.name.rpartition('/')[2]}-dpt"
    target = folder / (re.sub(r"[^\w.-]+", "-", title) + ".safetensors" if config.format == "kohya" else LORA_FILE)
    if config.format != "merged":
        _check_folder(target, lora, base)
    if config.format == "merged":
        written = write_merged(lora, base, folder, DTYPES[model.dtype], adapter)
        if "dtype" not in model.model_fields_set and (stored := stored_dtype(base)) != model.dtype:
            log.info("written in %s; the base's files are %s: --dtype %s halves the model", model.dtype, stored, stored)
    else:
        written = [_write_lora(target, lora, base, config, title)]
        if adapter is not None:
            written += copy_adapter(adapter, folder / "adapter")
    written.append(write_export_card(folder, title, base, lora.ours.get("config", {}), config.license, **measured))
    files = [str(file.relative_to(folder)) for file in written]
    return {
        "format": config.format,
        "output_dir": str(folder),
        "files": files,
        "layers": len(lora.layers),
        "rank": sorted({layer.rank for layer in lora.layers.values()}),
        "alpha": sorted({layer.alpha for layer in lora.layers.values()}),
        "summary": [f"{len(lora.layers)} LoRA layers as {config.format}:", *files],
    }


def diffusers_tensors(lora: LoraFile) -> dict[str, Tensor]:
    """The keys that diffusers writes: `unet.<module>.lora.down.weight`; of DiT `transformer.<module>.lora_A.weight`."""
    halves = {"unet": ("lora.down", "lora.up"), "transformer": ("lora_A", "lora_B")}
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.layers.items():
        down, up = halves[name.partition(".")[0]]
        tensors |= {f"{name}.{down}.weight": layer.down, f"{name}.{up}.weight": layer.up}
    return tensors


def with_alpha_inside(lora: LoraFile) -> LoraFile:
    """The same changes with alpha = rank: of transformers' files ComfyUI knows no place where alpha could stand."""
    layers = {
        name: LoraLayer(layer.down, layer.up * (layer.alpha / layer.rank), float(layer.rank))
        for name, layer in lora.layers.items()
    }
    return replace(lora, layers=layers)


def diffusers_header(lora: LoraFile, base: BaseModel) -> dict[str, str]:
    """diffusers' entry, without which alpha is lost, and ours, without paths."""
    layers = {name.removeprefix(f"{base.denoiser_key}."): layer for name, layer in lora.layers.items()}
    described = lora_metadata(layers, base.denoiser_key)
    header = {"format": "pt", DIFFUSERS_HEADER_KEY: json.dumps(described, default=sorted, sort_keys=True)}
    return header | ({HEADER_KEY: json.dumps(public(lora.ours), sort_keys=True)} if lora.ours else {})


def write_merged(
    lora: LoraFile, base: BaseModel, folder: Path, dtype: torch.dtype, adapter: Path | None = None
) -> list[Path]:
    """The whole base with the LoRA in its weights, a diffusers folder that needs no LoRA support; the adapter inside.

    Raises:
        InputError: `folder` holds something already, or the base does not load.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"output folder {folder} is not empty; give a new one for a merged model")
    pipeline = read_pipeline(base.folder, "DiffusionPipeline")
    denoiser: nn.Module = getattr(pipeline, base.denoiser_key)
    _check_base(lora, base, {"weights": weights_hash(denoiser), "parts": part_hashes(pipeline)})
    for name, layer in lora.layers.items():
        weight: Any = denoiser.get_submodule(name.removeprefix(f"{base.denoiser_key}.")).weight
        weight.data += change_of(layer).to(weight.dtype)
    pipeline.to(dtype=dtype)
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    if (sampling := base.folder / SAMPLING).is_file():
        (unfinished / SAMPLING).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sampling, unfinished / SAMPLING)
    if adapter is not None:  # where `dpt` looks for the adapter of a plain base
        now = {"name": folder.resolve().name, "weights": weights_hash(denoiser), "lora": None}
        copy_adapter(adapter, unfinished / "dpt" / "probe" / "adapter", now | {"parts": part_hashes(pipeline)})
    if folder.exists():
        folder.rmdir()
    os.replace(unfinished, folder)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def stored_dtype(base: BaseModel) -> str:
    """That of the denoiser's files, such as `float16`; `float32` of formats that do not tell."""
    files = (base.folder / base.denoiser_key).glob("*.safetensors")
    for file in sorted(files, key=lambda file: (len(file.suffixes), file.name)):  # a variant (`.fp16`) last
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118  # it is no mapping
                if (name := weights.get_slice(key).get_dtype()) in STORED:
                    return STORED[name]
    return "float32"


def change_of(layer: LoraLayer) -> Tensor:
    """`alpha / rank * up @ down`, in the shape of the module's weight."""
    product = layer.up.flatten(1) @ layer.down.flatten(1)
    return (layer.alpha / layer.rank * product).reshape(layer.up.shape[0], *layer.down.shape[1:])


def copy_adapter(source: Path, target: Path, base: Mapping[str, Any] | None = None) -> list[Path]:
    """Copy an adapter's folder, the paths in its config cut to their last part.

    Args:
        base: entries of its base's fingerprint that are others now.
    """
    card = _adapter_card(source)
    card["base"] |= base or {}
    if source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)
    write_text(target / ADAPTER_CONFIG, json.dumps(card, indent=2) + "\n")
    return [target / ADAPTER_WEIGHTS, target / ADAPTER_CONFIG]


def _adapter_card(folder: Path) -> dict[str, Any]:
    """What an adapter's `config.json` says, fit to be published. Raises `InputError` where there is no adapter."""
    try:
        card: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise FileNotFoundError(f"{ADAPTER_WEIGHTS} is missing")
        told, text = dict(card["adapter"]), card["adapter"].get("grounding_text")
        if text is not None and not text.startswith("./"):  # such a one is a part of this very folder
            told["grounding_text"] = public(text)
        return {**card, "adapter": told, "base": dict(public(card["base"])), "metadata": public(card["metadata"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is no adapter folder ({error}); give the one that `dpt probe` wrote") from error


def _check_base(lora: LoraFile, base: BaseModel, hashes: Mapping[str, Any] | None = None) -> None:
    """The shapes fit already; what they do not tell are the prediction type and, once loaded, the weights."""
    if "base" not in lora.ours:
        return
    made_for = lora.ours["base"]
    architecture = dict(made_for.get("architecture", {}))
    if base.prediction_type is not None and "prediction_type" in architecture:
        architecture["prediction_type"] = base.prediction_type
    actual = {"architecture": architecture, "name": base.name, **(hashes or {})}
    check_fingerprint(made_for, actual, f"LoRA {lora.path}")


def _write_lora(path: Path, lora: LoraFile, base: BaseModel, config: ExportConfig, title: str) -> Path:
    if config.format == "kohya":
        tensors = kohya_tensors(lora, base)
        header = kohya_header(lora, base, tensors, title, config.license, config.usage_hint)
    else:
        tensors, header = diffusers_tensors(lora), diffusers_header(lora, base)
    if path.resolve() == lora.path.resolve():
        raise InputError(f"{path} is the LoRA to export itself; give another --output_dir")
    with in_one_move(path) as unfinished:
        save_file({key: value.contiguous() for key, value in tensors.items()}, unfinished, metadata=header)
    return path


def _check_measured(measured: Mapping[str, Mapping[str, Any]], lora: Path, adapter: Path | None) -> None:
    """Figures of `dpt evaluate itm | rec` say which weights they are of; older ones do not.

    One LoRA may lie in several files, of another header or format, so that of another file is a warning.
    """
    ours = {"lora": file_hash(lora), "adapter": None if adapter is None else file_hash(adapter / ADAPTER_WEIGHTS)}
    for kind, figures in measured.items():
        for part, told in figures.get("weights", {}).items():
            if told == ours[part]:
                continue
            files = f"{told or 'none'}, not {ours[part] or 'none'}"
            differ = f"the figures given as --{kind} are of another {part} file than is exported ({files})"
            if part == "adapter":
                raise InputError(f"{differ}; measure this one, or leave them out")
            log.warning("%s; see that it is the same LoRA", differ)


def _check_folder(target: Path, lora: LoraFile, base: BaseModel) -> None:
    """What would be replaced, or described by the same card, must be the same LoRA."""
    for file in (target, target.with_name(LORA_FILE)):
        if not file.is_file():
            continue
        try:
            other = read_lora(
                file,
                {base.denoiser_key: base.denoiser},
                base.name,
                diffusers_reader(base.lora_reader(), base.denoiser),
            )
        except InputError:
            other = None
        if other is None or not _is_same(lora, other):
            raise InputError(f"{file} is not the LoRA to export; give another --output_dir or --title")


def _is_same(one: LoraFile, other: LoraFile) -> bool:
    return one.layers.keys() == other.layers.keys() and all(
        torch.allclose(change_of(layer), change_of(other.layers[name]), rtol=1e-2, atol=1e-5)  # one may be in float16
        for name, layer in one.layers.items()
    )


def _measured_files(config: ExportConfig) -> dict[str, Path | None]:
    return {"alignment": config.alignment, "itm": config.itm, "rec": config.rec}
