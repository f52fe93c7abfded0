"""A base model as its config files tell it: enough to check and name a LoRA's layers without loading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from dpt_t2i.backbones.loading import base_folder, read_json
from dpt_t2i.backbones.parts import SAMPLE_SIZE
from dpt_t2i.errors import InputError

DENOISERS = ("unet", "transformer")  # by which names diffusers' pipelines call theirs


@dataclass(frozen=True)
class BaseModel:
    """What a diffusers folder says of itself."""

    folder: Path
    name: str  # hub id, `bundled`, or the folder's last part: fit to be published
    pipeline_class: str  # such as `StableDiffusionXLPipeline`
    denoiser_key: str  # `unet` or `transformer`
    denoiser: nn.Module  # on the meta device: names and shapes, no values
    config: Mapping[str, Any]  # the denoiser's
    prediction_type: str | None  # `epsilon`, `v_prediction`, `sample`; None where the scheduler does not say (flow)
    image_size: tuple[int, int]  # (height, width) in pixels

    def lora_reader(self) -> Any:
        """The pipeline's class, whose `lora_state_dict` reads foreign formats where the family has one."""
        return getattr(diffusers, self.pipeline_class, None)


def look_at_base(name_or_path: str, revision: str | None = None) -> BaseModel:
    """Read the config files of a base.

    Raises:
        InputError: no such base, a config file missing or broken, or no denoiser that diffusers knows.
    """
    folder = base_folder(name_or_path, revision)
    index = read_json(folder / "model_index.json")
    key = next((key for key in DENOISERS if index.get(key)), None)
    if key is None:
        raise InputError(f"{folder / 'model_index.json'} names no {' or '.join(DENOISERS)}: no text-to-image model")
    config = read_json(folder / key / "config.json")
    place = Path(name_or_path).expanduser()
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    vae = read_json(folder / "vae" / "config.json")
    size = config.get("sample_size") or SAMPLE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    scale = 2 ** (len(vae.get("block_out_channels", ())) - 1)
    return BaseModel(
        folder=folder,
        name=place.resolve().name if place.exists() else name_or_path,
        pipeline_class=str(index.get("_class_name")),
        denoiser_key=key,
        denoiser=_on_meta(str(index[key][1]), config, folder / key),
        config=config,
        prediction_type=scheduler.get("prediction_type"),
        image_size=(height * scale, width * scale),
    )


def _on_meta(class_name: str, config: Mapping[str, Any], folder: Path) -> nn.Module:
    model_class = getattr(diffusers, class_name, None)
    if model_class is None:
        raise InputError(f"{folder}: this diffusers ({diffusers.__version__}) does not know {class_name}; upgrade it")
    try:
        with torch.device("meta"):
            denoiser: nn.Module = model_class.from_config(config)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'} does not fit {class_name}: {error}; fetch it again") from error
    return denoiser
