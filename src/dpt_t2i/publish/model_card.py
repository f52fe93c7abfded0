"""A run's `README.md`: what it is, how it was made, what was measured. Nothing in it that is not in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpt_t2i.errors import InputError

TEMPLATES = Path(__file__).with_name("templates")
CONFIG = "config.yaml"
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
        InputError: the folder has no readable `config.yaml`.
    """
    config = _read_config(run_folder / CONFIG)
    settings = {key: value for key in SHOWN if (value := _leaf(config, key)) is not None}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    card = environment.get_template("model_card.md.j2").render(
        name=run_folder.resolve().name,
        stage="control" if config.get("objective") == "denoise_only" else "tune" if "lora" in config else "probe",
        base=_base(config),
        is_hub_id=_is_hub_id(_base_setting(config)),
        settings=settings,
        alignment=alignment,
        itm=itm,
        rec=rec,
        versions=next((measured["versions"] for measured in (alignment, itm, rec) if measured), {}),
    )
    path = run_folder / "README.md"
    unfinished = run_folder / "README.md.partial"
    unfinished.write_text(card.strip() + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}; give the folder of a finished run") from error
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), Mapping):
        raise InputError(f"{path} is not the config of a run: it has no `model` section")
    return config


def _leaf(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _base_setting(config: Mapping[str, Any]) -> str:
    return str(config["model"].get("pretrained_model_name_or_path", "bundled"))


def _base(config: Mapping[str, Any]) -> str:
    """The base's name; of a folder only its last part, so that no private path is published."""
    setting = _base_setting(config)
    return setting if _is_hub_id(setting) else Path(setting).name


def _is_hub_id(name: str) -> bool:
    """`owner/name`, and no folder here."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).exists()
