"""The `README.md` of a run or an export: what it is, how it was made, how it is used, what was measured.

Nothing in it that is not in a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpt_t2i.backbones.lora import LORA_FILE
from dpt_t2i.config import CorrectionConfig
from dpt_t2i.errors import InputError
from dpt_t2i.files import write_text
from dpt_t2i.publish.base_model import BaseModel, look_at_base
from dpt_t2i.publish.privacy import public

TEMPLATES = Path(__file__).with_name("templates")
CONFIG = "config.yaml"
CONFIG_BEFORE = "config.before.yaml"  # of a run that went on with other settings
UNKNOWN_STRENGTH = {"correct": 0.05, "correction_rule": "relative"}  # to begin with, where none is stored
OURS = b"dpt-t2i"  # stands in every card
ADAPTERS = ("adapter", "dpt/probe/adapter")  # beside a LoRA; inside a merged model
MEASURED = {  # what the card takes of each
    "alignment": {"suite", "prompts", "seeds", "arms", "categories", "differences"},
    "itm": {"examples", "timesteps"},
    "rec": {"examples", "timesteps", "oracle"},
}
SHOWN = (  # settings in the card's table, where the run has them
    "model.tap",
    "lora.rank",
    "lora.lora_scope",
    "adapter.hidden_dim",
    "adapter.num_queries_matching",
    "adapter.num_queries_rec",
    "data.dataset",
    "data.resolution",
    "train.max_train_steps",
    "train.train_batch_size",
    "train.gradient_accumulation_steps",
    "train.learning_rate",
    "train.lr_scheduler",
    "train.mixed_precision",
    "seed",
)


@dataclass(frozen=True)
class Files:
    """What lies in the folder that the card is for."""

    lora: bool  # diffusers' `pytorch_lora_weights.safetensors`
    kohya: tuple[str, ...]  # names of files for ComfyUI and A1111
    merged: bool  # the folder is a whole model
    adapter: str | None  # the adapter's folder, relative
    correction: Mapping[str, Any]  # best strength, where one was measured and stored with the adapter


def write_model_card(
    run_folder: Path,
    alignment: Mapping[str, Any] | None = None,
    itm: Mapping[str, Any] | None = None,
    rec: Mapping[str, Any] | None = None,
) -> Path:
    """Write `run_folder/README.md` from the run's `config.yaml` and from what was measured.

    Args:
        alignment, itm, rec: contents of the JSON files of the same names; what is missing is not mentioned.

    Raises:
        InputError: the folder has no readable `config.yaml`, its base is not there, or a `README.md` of somebody else.
    """
    check_card_place(run_folder)
    config = _read_config(run_folder / CONFIG)
    name, revision = (setting_of(config, f"model.{key}") for key in ("pretrained_model_name_or_path", "revision"))
    base = look_at_base(str(name), revision)
    files, stage = _look(run_folder), _stage(config, "probe")
    about = _about_base(base) | {
        "title": run_folder.resolve().name,
        "stage": stage,
        "license": None,
        "all_settings": CONFIG,
        "settings_before": CONFIG_BEFORE if (run_folder / CONFIG_BEFORE).is_file() else None,
        "files": replace(files, lora=stage != "probe", adapter="adapter" if stage in ("probe", "tune") else None),
    }
    return _write(run_folder, config, about, {"alignment": alignment, "itm": itm, "rec": rec})


def write_export_card(
    folder: Path, title: str, base: BaseModel, config: Mapping[str, Any], license_: str | None, **measured: Any
) -> Path:
    """Write `folder/README.md` for what `dpt export` put there.

    Args:
        config: of the run that made the LoRA, from its header; {} for a foreign file.
        measured: `alignment`, `itm`, `rec` as above.
    """
    about = _about_base(base) | {
        "title": title,
        "stage": _stage(config, "foreign"),
        "license": license_,
        "all_settings": None,
        "settings_before": None,
        "files": _look(folder),
    }
    return _write(folder, config, about, {key: measured.get(key) for key in MEASURED})


def check_card_place(folder: Path) -> None:
    """Raises `InputError` where `folder` has a `README.md` that somebody else wrote, which a card would replace."""
    path = folder / "README.md"
    if path.is_file() and OURS not in path.read_bytes():
        raise InputError(f"{path} is none of our cards and would be replaced; move it, or give another output_dir")


def read_measured(file: Path, kind: str) -> dict[str, Any]:
    """A result file of `dpt evaluate KIND`. Raises `InputError`: missing, not JSON, or of another kind."""
    try:
        measured: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}; give the JSON that `dpt evaluate` wrote") from error
    if kind == "itm" and isinstance(measured, dict) and "oracle" in measured:
        raise InputError(f"{file} is no result of `dpt evaluate itm`, but of `dpt evaluate rec`; give it as --rec")
    lacking = sorted(MEASURED[kind] - set(measured)) if isinstance(measured, dict) else sorted(MEASURED[kind])
    if lacking:
        raise InputError(f"{file} is no result of `dpt evaluate {kind}`: it has no `{lacking[0]}`")
    return measured


def _write(folder: Path, config: Mapping[str, Any], about: Mapping[str, Any], measured: Mapping[str, Any]) -> Path:
    settings = {key: public(value) for key in SHOWN if (value := setting_of(config, key)) is not None}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    card = environment.get_template("model_card.md.j2").render(
        **about,
        **measured,
        name=folder.resolve().name,
        correction_flags=_correction_flags(about["files"].correction),
        settings=settings,
        versions=next((one["versions"] for one in measured.values() if one and "versions" in one), {}),
    )
    path = folder / "README.md"
    write_text(path, card.strip() + "\n")
    return path


def _correction_flags(stored: Mapping[str, Any]) -> str:
    """All that is stored of a correction and is not the command's default, as its flags."""
    default = CorrectionConfig().model_dump(mode="json")
    flags = {key: value for key, value in stored.items() if key in default and value != default[key]}
    return "".join(
        f" --{key}" if value is True else f" --{key} {value}" for key, value in (flags or UNKNOWN_STRENGTH).items()
    )


def _stage(config: Mapping[str, Any], without_lora: str) -> str:
    alone = {"denoise_only": "control", "denoise_itm": "denoise_itm"}.get(config.get("objective", ""))
    if alone is not None:
        return alone
    return "tune" if "lora" in config else without_lora


def _look(folder: Path) -> Files:
    adapters = [place for place in ADAPTERS if (folder / place / "config.json").is_file()]
    card = json.loads((folder / adapters[0] / "config.json").read_text(encoding="utf-8")) if adapters else {}
    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    return Files(
        lora=LORA_FILE in weights,
        kohya=tuple(name for name in weights if name != LORA_FILE),
        merged=(folder / "model_index.json").is_file(),
        adapter=adapters[0] if adapters else None,
        correction=card.get("metadata", {}).get("correction", {}),
    )


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}; give the folder of a finished run") from error
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), Mapping):
        raise InputError(f"{path} is not the config of a run: it has no `model` section")
    return config


def setting_of(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of a run's config; None where it has none."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _about_base(base: BaseModel) -> dict[str, Any]:
    return {
        "base": base.name,
        "is_hub_id": _is_hub_id(base.name),
        "diffusers_loads": hasattr(base.lora_reader(), "load_lora_weights"),
        "dit": base.denoiser_key != "unet",
    }


def _is_hub_id(name: str) -> bool:
    """`owner/name`, and no folder here."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).exists()
