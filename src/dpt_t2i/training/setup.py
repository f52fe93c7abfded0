"""What both recipes begin with: devices, the frozen model, the adapter, the data."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed

from dpt_t2i.adapter.grounding_text import load_grounding_text
from dpt_t2i.adapter.io import save_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.fingerprint import lora_hash
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import load_backbone, resolve_device
from dpt_t2i.backbones.lora import LORA_FILE
from dpt_t2i.backbones.taps import parse_fusion
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import AdapterConfig, ProbeConfig, TrainConfig, TuneConfig, save_config
from dpt_t2i.data.buckets import sort_into_buckets
from dpt_t2i.data.examples import Examples, View
from dpt_t2i.data.perturb import perturb
from dpt_t2i.data.sources import is_streamed, open_records
from dpt_t2i.data.streams import ShardStream, open_stream
from dpt_t2i.errors import InputError
from dpt_t2i.files import keep_copy
from dpt_t2i.training.cached import open_cache
from dpt_t2i.training.checkpoint import checkpoints
from dpt_t2i.training.encode import Encoder
from dpt_t2i.training.sharding import read_plugin, sharding_asked
from dpt_t2i.training.start import restore_start, tap_of_start
from dpt_t2i.training.trackers import METRICS, start_trackers, usable_tracker
from dpt_t2i.training.validation import Validation

# One process, or several that hold all weights (DDP), or all but the frozen denoiser's (FSDP, see `sharding`).
SUPPORTED = (
    DistributedType.NO,
    DistributedType.FSDP,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
)
LAUNCHED_PRECISION = "ACCELERATE_MIXED_PRECISION"  # what `accelerate launch` was told
RESULTS = (LORA_FILE, "adapter", "adapters")  # what a run leaves at its end
PLACES = {"train.resume_from_checkpoint", "output_dir", "run_name"}  # differ where another folder is gone on in
PATIENCE = timedelta(hours=2)  # in which processes wait for each other: the first one alone draws samples
StageConfig = TypeVar("StageConfig", ProbeConfig, TuneConfig)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """Everything a recipe works with."""

    config: ProbeConfig | TuneConfig  # as asked, with what an adapter to start from brings along
    accelerator: Accelerator
    backbone: Backbone
    taps: tuple[Tap, ...]
    adapter: DiscriminativeAdapter
    adapter_metadata: dict[str, Any]  # what came with the adapter that training starts from
    encoder: Encoder
    examples: Examples | ShardStream
    validation: Validation


def set_up(config: StageConfig) -> Setup:
    """Load and build; weights of a new adapter follow from `config.seed`.

    Raises:
        InputError: anything that is missing, broken, or does not fit together.
    """
    _check_rate(config.train)
    earlier = checkpoints(config.folder)
    if earlier and config.train.resume_from_checkpoint is None:
        raise InputError(
            f"{config.folder} holds an earlier run (up to step {earlier[-1][0]}): go on with "
            "--resume_from_checkpoint latest, or give another --output_dir or --run_name"
        )
    finished = [name for name in RESULTS if (config.folder / name).exists()]
    if finished and not earlier and (config.folder / METRICS).is_file():
        raise InputError(
            f"{config.folder} holds what an earlier run made ({', '.join(finished)}), and no checkpoint to go on from; "
            "give another --output_dir or --run_name, or take it away"
        )
    accelerator = make_accelerator(config)
    tap = config.model.tap or tap_of_start(config.model.adapter)
    config = config.model_copy(update={"model": config.model.model_copy(update={"tap": tap})})
    model, settings = config.model, config.train
    backbone = load_backbone(model.pretrained_model_name_or_path, model.revision, str(accelerator.device), model.dtype)
    backbone.keep_hashes()  # the base is frozen: one reading does for every checkpoint
    _prepare_denoiser(backbone, settings, accelerator)
    _check_timesteps(backbone, config)
    taps, fusion = backbone.parse_taps(tap), parse_fusion(tap)
    restored, metadata = None, dict[str, Any]()
    if model.adapter not in (None, "none"):
        keep = config.folder / "start" / "grounding_text"
        with accelerator.main_process_first():  # which writes what is kept; the others find it there
            restored, metadata = restore_start(str(model.adapter), backbone, taps, config.adapter, fusion, keep)
        _tell_sizes(config.adapter, restored.config)
        config = config.model_copy(update={"adapter": restored.config})  # its own sizes hold, whatever was asked for
    elif fusion is not None:
        fused = {"fusion_channels": fusion[0], "fusion_size": fusion[1]}
        config = config.model_copy(update={"adapter": config.adapter.model_copy(update=fused)})
    grounding, text_dim = None, backbone.text_dim
    if config.adapter.grounding_text != "denoiser":
        grounding = load_grounding_text(config.adapter.grounding_text, accelerator.device)
        text_dim = grounding.text_dim
    set_seed(config.seed)
    adapter = restored or DiscriminativeAdapter(
        config.adapter, {tap.name: tap.channels for tap in taps}, backbone.pooled_dim, text_dim
    )
    _check_widths(adapter, backbone, text_dim)
    adapter = adapter.to(accelerator.device)
    size = config.data.resolution or min(backbone.image_size)
    cached = open_cache(config.data, backbone, size)
    encoder = Encoder(
        backbone,
        adapter.config.num_token_classes,
        grounding,
        settings.vae_batch_size,
        cached,
        skip_bad=config.data.on_bad == "skip",
    )
    examples = _open_examples(config, size, accelerator.num_processes)
    held_out = open_records(config.data, "val", size)
    validation = Validation(backbone, adapter, taps, held_out, size, batch_size=settings.val_batch_size)
    return Setup(config, accelerator, backbone, taps, adapter, metadata, encoder, examples, validation)


def set_up_each(config: ProbeConfig) -> dict[str, Setup]:
    """For each tap of `atlas.taps` its name and a setup with an adapter of its own; all else is shared.

    Each adapter starts as it would in a run of its own.

    Raises:
        InputError: see `set_up`; a fused tap, an adapter to start from, or a single adapter's run in the folder.
    """
    taps = config.atlas.taps or ""
    if parse_fusion(taps) is not None:
        raise InputError(f"taps `{taps}` fuses its blocks into one map; name them without sizes")
    if config.model.adapter not in (None, "none"):
        raise InputError("taps gives each tap a fresh adapter; leave adapter out, or give tap instead")
    joint = set_up(config)
    pattern, setups = joint.adapter, dict[str, Setup]()
    for tap in joint.taps:
        set_seed(config.seed)
        adapter = DiscriminativeAdapter(
            pattern.config, {tap.name: tap.channels}, pattern.pooled_dim, pattern.text_dim
        ).to(joint.accelerator.device)
        setups[tap.name] = replace(joint, taps=(tap,), adapter=adapter)
    return setups


def make_accelerator(config: ProbeConfig | TuneConfig) -> Accelerator:
    """Accelerate's own choice of device and processes, or the single device that `device` names.

    Raises:
        InputError: the device is not here, accelerate refuses mixed_precision or report_to, or the launcher asks for
            DeepSpeed, or for an FSDP that training cannot follow.
    """
    train = config.train
    if sharding_asked():
        read_plugin()
    place = resolve_device(config.model.device)
    if place.type == "cpu" and (train.mixed_precision or os.environ.get(LAUNCHED_PRECISION)) == "fp16":
        raise InputError("mixed_precision fp16 needs a GPU: a CPU would take float32; give --mixed_precision bf16")
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    tracker = usable_tracker(train.report_to)
    # Behind the cut nothing asks the LoRA of the control for a gradient, which processes would wait for.
    cut = isinstance(config, TuneConfig) and config.objective != "dpt" and config.denoise.detach_unet_feature
    try:
        accelerator = Accelerator(
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=bool(cut)),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
            mixed_precision=train.mixed_precision,  # None = what the launcher was told
            cpu=place.type == "cpu",
            log_with=tracker,
            project_dir=str(config.folder),
        )
    except (ValueError, ImportError) as error:
        asked = train.mixed_precision or "of the launcher"
        raise InputError(f"mixed_precision {asked}, report_to {train.report_to}: {error}") from error
    if accelerator.distributed_type not in SUPPORTED:
        raise InputError(
            f"{accelerator.distributed_type.value} cuts up what is trained, which checkpoints cannot read; launch with "
            "--multi_gpu, or with --config_file configs/fsdp.yaml"
        )
    if sharding_asked() and accelerator.mixed_precision == "fp16":
        raise InputError("mixed_precision fp16 does not go with FSDP; give --mixed_precision bf16")
    if tracker is not None:
        start_trackers(accelerator, config.run_name, _leaves(config.model_dump(mode="json")))
    return accelerator


def _open_examples(config: StageConfig, size: int, processes: int) -> Examples | ShardStream:
    data, train = config.data, config.train
    skip_bad = data.on_bad == "skip"
    alone = isinstance(config, TuneConfig) and config.objective == "denoise_only"
    view = View(data.center_crop, data.random_flip, perturb, alone)
    if is_streamed(data):
        return open_stream(data, size, view)
    records, buckets = open_records(data, "train", size), None
    if data.aspect_buckets:
        step = train.train_batch_size * train.gradient_accumulation_steps * processes
        buckets = sort_into_buckets(records, size, step, skip_bad=skip_bad)
        shapes = (f"{count} of {width} x {height}" for (width, height), count in buckets.counts().items())
        log.info("aspect buckets: %s", ", ".join(shapes))
    return Examples(records, size, data.data_seed, view, skip_bad=skip_bad, buckets=buckets)


def _prepare_denoiser(backbone: Backbone, settings: TrainConfig, accelerator: Accelerator) -> None:
    if settings.gradient_checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]  # of every diffusers model
    if settings.enable_xformers_memory_efficient_attention and accelerator.is_main_process:
        log.info("attention runs in PyTorch's own fused kernels (SDPA); xformers is not used")


def _check_rate(settings: TrainConfig) -> None:
    if settings.lr_warmup_steps and settings.lr_scheduler == "constant":
        raise InputError(
            "lr_scheduler constant has no warm-up; give --lr_scheduler constant_with_warmup, or leave lr_warmup_steps "
            "out"
        )


def _check_timesteps(backbone: Backbone, config: ProbeConfig | TuneConfig) -> None:
    low, high = config.train.min_timestep, config.train.max_timestep
    if not low <= high < backbone.num_train_timesteps:
        raise InputError(
            f"timesteps {low} to {high}: min_timestep must not be above max_timestep, nor that above the model's last, "
            f"{backbone.num_train_timesteps - 1}"
        )
    if not isinstance(config, TuneConfig):
        return
    denoise, distill = config.denoise, config.distill
    for name, weight, lowest in (
        ("denoise_itm_min_timestep", denoise.denoise_itm_coef, denoise.denoise_itm_min_timestep),
        ("denoise_dpo_min_timestep", denoise.denoise_dpo_coef, denoise.denoise_dpo_min_timestep),
        ("distill_min_timestep", distill.distill_coef, distill.distill_min_timestep),
    ):
        if weight and lowest > high:
            raise InputError(f"{name} {lowest} is above max_timestep {high}: that loss would be 0 for ever; lower it")


def _tell_sizes(asked: AdapterConfig, found: AdapterConfig) -> None:
    """Settings of an adapter that are given and are not those of the one to start from, which keeps its own."""
    plain = AdapterConfig()
    for name, value in asked:
        if value != getattr(plain, name) and value != getattr(found, name):
            log.warning("%s %s is not used: the adapter to start from has %s", name, value, getattr(found, name))


def _check_widths(adapter: DiscriminativeAdapter, backbone: Backbone, text_dim: int) -> None:
    """An imported adapter knows no base: at least the widths of the texts that it reads must be right."""
    if adapter.pooled_dim != backbone.pooled_dim:
        raise InputError(
            f"the adapter compares texts of width {adapter.pooled_dim}, base `{backbone.name}` gives "
            f"{backbone.pooled_dim}; use the base that it was trained on"
        )
    if adapter.text_dim != text_dim:
        raise InputError(
            f"the adapter reads expressions of width {adapter.text_dim}, grounding_text "
            f"`{adapter.config.grounding_text}` gives {text_dim}; name the encoder that it was trained with"
        )


def write_config(config: ProbeConfig | TuneConfig) -> None:
    """`config.yaml` of the run: once it is known that the run can begin, so that a refused one overwrites nothing.

    What a run that goes on has otherwise than before is told, and the settings of before stay as `config.before.yaml`.
    """
    file, resume = config.folder / "config.yaml", config.train.resume_from_checkpoint
    if resume is not None:
        origin = Path(resume).resolve().parent / file.name if Path(resume).is_dir() else file
        before, now = _leaves(_read(origin)), _leaves(config.model_dump(mode="json"))
        expected = {"train.resume_from_checkpoint"} if origin.resolve() == file.resolve() else PLACES
        changed = [key for key in now if before.get(key) != now[key] and key not in expected] if before else []
        for key in changed:
            log.warning("goes on with %s %s, which was %s", key, now[key], before.get(key, "not told"))
        if changed and file.is_file():
            keep_copy(file)
    save_config(config, file)


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # a kill cut it short, or somebody's editor did


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    below = (_leaves(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for leaves in below for key, value in leaves.items()}


def store_adapter(setup: Setup, folder: Path, **metadata: Any) -> None:
    """Write the adapter with what it needs to be used again: taps, base, LoRA, and what the recipe adds."""
    save_adapter(
        setup.adapter,
        folder,
        base_fingerprint={**setup.backbone.fingerprint(), "lora": lora_hash(setup.backbone.denoiser)},
        metadata=setup.adapter_metadata | metadata,
    )
