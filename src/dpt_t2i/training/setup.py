"""What both recipes begin with: devices, the frozen model, the adapter, the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from dpt_t2i.adapter.grounding_text import load_grounding_text
from dpt_t2i.adapter.io import load_adapter, read_adapter_card, save_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.fingerprint import lora_hash
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import load_backbone, resolve_device
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import AdapterConfig, ProbeConfig, TrainConfig, TrainModelConfig, TuneConfig, save_config
from dpt_t2i.data.examples import Examples
from dpt_t2i.data.sources import open_records
from dpt_t2i.errors import InputError
from dpt_t2i.training.checkpoint import checkpoints
from dpt_t2i.training.encode import Encoder
from dpt_t2i.training.validation import Validation

StageConfig = TypeVar("StageConfig", ProbeConfig, TuneConfig)


@dataclass(frozen=True)
class Setup:
    """Everything a recipe works with."""

    accelerator: Accelerator
    backbone: Backbone
    taps: tuple[Tap, ...]
    adapter: DiscriminativeAdapter
    adapter_metadata: dict[str, Any]  # what came with the adapter that training starts from
    encoder: Encoder
    examples: Examples
    validation: Validation


def set_up(config: StageConfig) -> Setup:
    """Load and build, write `config.yaml`; weights of a new adapter follow from `config.seed`.

    Raises:
        InputError: anything that is missing, broken, or does not fit together.
    """
    earlier = checkpoints(config.output_dir)
    if earlier and config.train.resume_from_checkpoint is None:
        raise InputError(
            f"{config.output_dir} holds an earlier run (up to step {earlier[-1][0]}): go on with "
            "--resume_from_checkpoint latest, or give another --output_dir"
        )
    config = _with_the_adapters_sizes(config)
    accelerator = make_accelerator(config.train, config.model, config.output_dir)
    if accelerator.is_main_process:
        save_config(config, config.output_dir / "config.yaml")
    model = config.model
    backbone = load_backbone(model.pretrained_model_name_or_path, model.revision, str(accelerator.device), model.dtype)
    if config.train.gradient_checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]  # of every diffusers model
    taps = backbone.parse_taps(model.tap)
    grounding = None
    if config.adapter.grounding_text != "denoiser":
        grounding = load_grounding_text(config.adapter.grounding_text, accelerator.device)
    low, high = config.train.min_timestep, config.train.max_timestep
    if not low <= high < backbone.num_train_timesteps:
        raise InputError(
            f"timesteps {low} to {high}: min_timestep must not be above max_timestep, nor that above the model's last, "
            f"{backbone.num_train_timesteps - 1}"
        )
    set_seed(config.seed)
    adapter, metadata = _adapter(config, backbone, taps, grounding.text_dim if grounding else backbone.text_dim)
    encoder = Encoder(backbone, adapter.config.num_token_classes, grounding)
    size = config.data.resolution or min(backbone.image_size)
    examples = Examples(open_records(config.data, "train", size), size, config.data.data_seed)
    validation = Validation(backbone, adapter, taps, open_records(config.data, "val", size), size)
    return Setup(accelerator, backbone, taps, adapter, metadata, encoder, examples, validation)


def make_accelerator(train: TrainConfig, model: TrainModelConfig, folder: Path) -> Accelerator:
    """Accelerate's own choice of device and processes, or the single device that `device` names.

    Raises:
        InputError: the device is not here, or accelerate refuses mixed_precision or report_to.
    """
    place = resolve_device(model.device)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    try:
        accelerator = Accelerator(
            mixed_precision=train.mixed_precision,
            cpu=place.type == "cpu",
            log_with=train.report_to,
            project_dir=str(folder),
        )
        if train.report_to:
            accelerator.init_trackers("dpt-t2i")
    except (ValueError, ImportError) as error:
        raise InputError(f"mixed_precision {train.mixed_precision}, report_to {train.report_to}: {error}") from error
    return accelerator


def _with_the_adapters_sizes(config: StageConfig) -> StageConfig:
    """Going on from an adapter, its own sizes and grounding encoder hold, whatever the config says of new ones."""
    source = config.model.adapter
    if source in (None, "none"):
        return config
    sizes = AdapterConfig.model_validate(read_adapter_card(Path(str(source)))["adapter"])
    return config.model_copy(update={"adapter": sizes})


def store_adapter(setup: Setup, folder: Path, **metadata: Any) -> None:
    """Write the adapter with what it needs to be used again: taps, base, LoRA, and what the recipe adds."""
    save_adapter(
        setup.adapter,
        folder,
        base_fingerprint={**setup.backbone.fingerprint(), "lora": lora_hash(setup.backbone.denoiser)},
        metadata=setup.adapter_metadata | metadata,
    )


def _adapter(
    config: ProbeConfig | TuneConfig, backbone: Backbone, taps: tuple[Tap, ...], text_dim: int
) -> tuple[DiscriminativeAdapter, dict[str, Any]]:
    """The adapter to start from, everything learned restored (`logit_scale` included), or a fresh one."""
    source = config.model.adapter
    device = torch.device(backbone.device)
    if source in (None, "none"):
        sizes = {tap.name: tap.channels for tap in taps}
        return DiscriminativeAdapter(config.adapter, sizes, backbone.pooled_dim, text_dim).to(device), {}
    adapter, metadata = load_adapter(Path(str(source)), device, backbone.fingerprint())
    if list(adapter.tap_channels) != [tap.name for tap in taps]:
        raise InputError(
            f"adapter {source} reads tap `{'_'.join(adapter.tap_channels)}`, the config says `{config.model.tap}`; "
            f"set tap to the adapter's"
        )
    return adapter, metadata
