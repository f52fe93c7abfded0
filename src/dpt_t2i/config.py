"""Typed settings: one frozen model a command, sections inside, every leaf's name unique within a command.

A value comes from, in rising order: the default below, the YAML file of `--config`, a dotted override
(`train.learning_rate=1e-4`) or the flag of the same leaf (`--learning_rate 1e-4`).
An unknown key is an error that names the nearest known one. All three hand over text, which the leaf's own type
reads: `no` is a word to `mixed_precision` and false to `gradient_checkpointing`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from dpt_t2i.errors import InputError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]

ALIASES = {  # other names that users know -> leaf
    "unet_feature": "tap",
    "correction_factor": "correct",
    "lora_rank": "rank",
    "num_inference_steps": "steps",
}


class Section(BaseModel):
    """Base of every section and command config: frozen, and nothing unknown passes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    pretrained_model_name_or_path: str = Field("bundled", description="diffusers folder, hub id, or `bundled`")
    revision: str | None = Field(None, description="git revision of a hub model")
    lora: str | None = Field(
        None, description="LoRA file or folder; `none` = plain base; default: what ships with the base"
    )
    adapter: str | None = Field(
        None, description="adapter folder; `none` = no adapter; default: what ships with the base"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the frozen weights")


class TrainModelConfig(ModelConfig):
    lora: str | None = Field("none", description="LoRA to start from; `none` = plain base")
    adapter: str | None = Field("none", description="adapter folder to start from (stage 2 needs that of stage 1)")
    tap: str = Field("up1", description="block whose features are read; join several with `_`")


class AdapterConfig(Section):
    """Sizes of the discriminative adapter; the defaults are the paper's."""

    hidden_dim: Positive = Field(256, description="width d")
    num_heads: Positive = Field(8, description="attention heads")
    dim_feedforward: Positive = Field(2048, description="width of the feed-forward layers")
    enc_layers: int = Field(1, ge=0, description="transformer encoder layers")
    dec_layers: Positive = Field(1, description="transformer decoder layers")
    dropout: Fraction = Field(0.1, description="dropout inside the transformer")
    num_queries_matching: Positive = Field(10, description="matching queries")
    num_queries_rec: Positive = Field(100, description="grounding queries")
    contrastive_dim: Positive = Field(64, description="width of the contrastive alignment")
    num_token_classes: Positive = Field(255, description="token positions of the soft-token classifier")
    normalize_features: bool = Field(True, description="normalise the map before the projection (the release does not)")
    grounding_text: str = Field(
        "denoiser", description="`denoiser` = the T2I model's own text encoder, or a RoBERTa folder / hub id"
    )


class DataConfig(Section):
    dataset: str = Field("scenes", description="`scenes`, or an imagefolder with metadata.jsonl")
    resolution: Positive = Field(64, description="pixels of the square image given to the VAE")
    dataloader_num_workers: int = Field(0, ge=0, description="loader processes; never changes what is seen")
    data_seed: int = Field(0, description="seed of the example order and of every random choice in the data")
    max_samples: int | None = Field(None, description="use only the first N records")
    val_samples: Positive = Field(256, description="held-out examples of a validation")


class ItmRecConfig(Section):
    """Weights of the losses (method.md section 3)."""

    itm_coef: float = Field(1.0, description="image-text matching, both directions")
    ce_coef: float = Field(1.0, description="soft-token cross entropy")
    bbox_coef: float = Field(5.0, description="L1 of boxes")
    giou_coef: float = Field(2.0, description="generalised IoU of boxes")
    align_coef: float = Field(1.0, description="contrastive alignment of queries and tokens")
    eos_coef: float = Field(0.1, description="weight of the no-object class")
    align_temperature: float = Field(0.07, gt=0, description="temperature of the contrastive alignment")
    on_policy_fraction: Fraction = Field(
        0.0, description="share of examples whose hard-negative image is the model's own sample for the caption"
    )
    on_policy_every: Positive = Field(200, description="optimiser steps between refreshes of the pool of own samples")
    on_policy_pool: Positive = Field(256, description="own samples kept in the pool")


class DenoiseConfig(Section):
    mse_loss_coef: float = Field(1.0, description="denoising loss")
    snr_gamma: float | None = Field(None, description="min-SNR gamma; none = plain MSE")
    caption_dropout: Fraction = Field(0.1, description="share of captions emptied in the denoising term")


class LoraSettings(Section):
    rank: Positive = Field(4, description="LoRA rank")
    lora_alpha: float | None = Field(None, description="LoRA alpha; default: the rank, so that the scale is 1")
    lora_scope: Literal["all", "to_tap"] = Field("all", description="attention of the whole denoiser, or up to the tap")


class TrainConfig(Section):
    max_train_steps: Positive = Field(60_000, description="optimiser steps")
    train_batch_size: Positive = Field(48, description="examples a device and step")
    gradient_accumulation_steps: Positive = Field(1, description="micro-batches an optimiser step")
    learning_rate: float = Field(1e-4, gt=0, description="peak rate of AdamW")
    lr_scheduler: Schedule = Field("constant", description="rate over steps")
    lr_warmup_steps: int = Field(0, ge=0, description="optimiser steps of warm-up")
    adam_weight_decay: float = Field(1e-2, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="clip the total gradient norm")
    min_timestep: int = Field(0, ge=0, description="lowest timestep drawn")
    max_timestep: int = Field(999, ge=0, description="highest timestep drawn")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast of the denoiser and adapter")
    gradient_checkpointing: bool = Field(False, description="recompute activations of the denoiser")
    checkpointing_steps: Positive = Field(500, description="steps between checkpoints")
    checkpoints_total_limit: Positive = Field(2, description="checkpoints kept")
    resume_from_checkpoint: str | None = Field(None, description="`latest`, or a checkpoint folder")
    validation_steps: Positive = Field(500, description="steps between validations")
    report_to: str | None = Field(None, description="tensorboard, wandb, trackio: through accelerate")


class ProbeConfig(Section):
    """Stage 1: probing. The denoiser is frozen, the adapter learns."""

    model: TrainModelConfig = TrainModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    loss: ItmRecConfig = ItmRecConfig()
    train: TrainConfig = TrainConfig()
    output_dir: Path = Field(Path("runs/probe"), description="run folder")
    seed: int = Field(0, description="seed of weights, noise and timesteps")


class TuneTrainConfig(TrainConfig):
    max_train_steps: Positive = Field(5_000, description="optimiser steps")
    train_batch_size: Positive = Field(8, description="examples a device and micro-batch")
    gradient_accumulation_steps: Positive = Field(8, description="micro-batches an optimiser step")
    lr_scheduler: Schedule = Field("cosine", description="rate over steps")


class TuneConfig(Section):
    """Stage 2: tuning. LoRA and adapter learn on ITM + REC + denoising."""

    model: TrainModelConfig = TrainModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    lora: LoraSettings = LoraSettings()
    data: DataConfig = DataConfig()
    loss: ItmRecConfig = ItmRecConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    train: TuneTrainConfig = TuneTrainConfig()
    objective: Literal["dpt", "denoise_only"] = Field(
        "dpt", description="`denoise_only` = the control arm: LoRA on the denoising loss alone"
    )
    output_dir: Path = Field(Path("runs/tune"), description="run folder")
    seed: int = Field(0, description="seed of weights, noise and timesteps")


class SampleConfig(Section):
    """How images are sampled; the same words in `generate` and `evaluate alignment`."""

    steps: Positive = Field(50, description="sampling steps")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance; 1 = off")
    scheduler: Literal["ddim", "euler", "dpm++", "unipc"] = Field("ddim", description="sampler")
    batch_size: Positive = Field(8, description="images at once; never changes an image")
    negative_prompt: str = Field("", description="text of the unconditional branch")


class CorrectionConfig(Section):
    """Self-correction (method.md section 5)."""

    correct: float = Field(0.0, ge=0, description="strength; 0 = off")
    correction_mode: Literal["state", "noise"] = Field(
        "state", description="`state`: the sampler steps from the corrected latent; `noise`: the release's way"
    )
    correction_rule: Literal["fixed", "relative"] = Field(
        "fixed", description="`fixed`: z + eta g; `relative`: z + rho |z| g / |g|"
    )
    correction_start: Fraction = Field(0.0, description="first corrected fraction of the schedule")
    correction_end: Fraction = Field(1.0, description="last corrected fraction of the schedule")
    correction_every: Positive = Field(1, description="correct every k-th step")


class SearchConfig(Section):
    best_of: Positive = Field(1, description="seeds tried for each image; the best by matching score is kept")
    score_timestep: int = Field(250, ge=0, description="timestep at which candidates are scored")
    score_draws: Positive = Field(2, description="fixed shared noises averaged in a score")


class GenerateConfig(Section):
    """Sample images from prompts."""

    model: ModelConfig = ModelConfig()
    prompt: tuple[str, ...] = Field((), description="prompt; may be given several times")
    prompts_file: Path | None = Field(None, description="text file (a prompt a line) or .jsonl with `prompt`")
    seeds: str = Field("0", description="`0`, `0,3,7` or `0-3`")
    height: int | None = Field(None, description="pixels; default: the model's own")
    width: int | None = Field(None, description="pixels; default: the model's own")
    sample: SampleConfig = SampleConfig()
    correction: CorrectionConfig = CorrectionConfig()
    search: SearchConfig = SearchConfig()
    output_dir: Path = Field(Path("runs/generate"), description="generation folder")
    seed: int = Field(0, description="seed of scoring noise; images take theirs from --seeds")


class ScoreConfig(Section):
    """Score an image against a prompt."""

    model: ModelConfig = ModelConfig()
    score_timestep: int = Field(250, ge=0, description="timestep of the judged latent")
    score_draws: Positive = Field(4, description="noises averaged")
    output_dir: Path = Field(Path("runs/score"), description="where the annotated PNG goes")
    seed: int = Field(0, description="seed of the noise")


class AlignmentConfig(Section):
    """Do the images obey their prompts? Paired arms over one prompt suite."""

    model: ModelConfig = ModelConfig()
    suite: Literal["dev", "test_seen", "test_heldout"] = Field("dev", description="prompt suite of the drawn scenes")
    arms: tuple[str, ...] = Field(
        ("base", "dpt", "dpt_correct"), description="arm of the comparison; may be given several times"
    )
    seeds: str = Field("0-1", description="`0`, `0,3,7` or `0-3`; the same for every arm")
    max_prompts: Annotated[int, Field(gt=0)] | None = Field(None, description="use only N prompts, in turn from each category")
    control_lora: Path | None = Field(None, description="LoRA of the control arm (denoising loss alone)")
    control_compute_lora: Path | None = Field(None, description="LoRA of the control arm with equal compute")
    onpolicy_lora: Path | None = Field(None, description="LoRA tuned on its own samples; its adapter lies beside it")
    probe_adapter: Path | None = Field(
        None, description="adapter that corrects the plain base; default: what ships with the base"
    )
    sample: SampleConfig = SampleConfig()
    correction: CorrectionConfig = CorrectionConfig()
    search: SearchConfig = SearchConfig()
    bootstrap_draws: Positive = Field(10_000, description="resamples of a confidence interval")
    output_dir: Path = Field(Path("runs/alignment"), description="evaluation folder; finished images are reused")
    seed: int = Field(0, description="seed of scoring noise and resampling; images take theirs from --seeds")


class DiscriminationConfig(Section):
    """Image-text matching and grounding accuracy of an adapter."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    timesteps: tuple[int, ...] = Field(
        (500, 250), description="timestep of the judged latent; may be given several times"
    )
    eval_batch_size: Positive = Field(32, description="examples at once; never changes a score")
    output_dir: Path = Field(Path("runs/discrimination"), description="evaluation folder")
    seed: int = Field(0, description="seed of the noise, shared by an example's positive and negatives")


class DemoConfig(Section):
    """The whole loop live, in minutes: probe, tune, generate, evaluate, report; beside what ships."""

    model: ModelConfig = ModelConfig()
    probe_steps: Positive = Field(60, description="optimiser steps of the live probe")
    tune_steps: Positive = Field(30, description="optimiser steps of the live tuning")
    demo_batch_size: Positive = Field(16, description="examples a step of both stages")
    demo_prompts: Positive = Field(30, description="prompts of the dev suite, in turn from every category")
    seeds: str = Field("0", description="`0`, `0,3,7` or `0-3`")
    sample: SampleConfig = SampleConfig(steps=30)
    output_dir: Path = Field(Path("runs/demo"), description="demo folder")
    seed: int = Field(0, description="seed of training and of scoring noise; images take theirs from --seeds")


class DoctorConfig(Section):
    """What this machine offers, and whether the model loads on it."""

    model: ModelConfig = ModelConfig()


ConfigT = TypeVar("ConfigT", bound=Section)


def leaves(config: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted path and field of every leaf of a config class, in order."""
    for name, info in config.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from leaves(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def resolve_key(config: type[Section], key: str) -> str:
    """Dotted path of `key`, which may be a bare leaf name; hyphen = underscore.

    Raises:
        InputError: the key is unknown; names the nearest one.
    """
    section, dot, name = key.replace("-", "_").rpartition(".")
    wanted = f"{section}{dot}{ALIASES.get(name, name)}"
    paths = [path for path, _ in leaves(config)]
    if wanted in paths:
        return wanted
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in paths}
    if wanted in by_leaf:
        return by_leaf[wanted]
    near = difflib.get_close_matches(wanted, [*paths, *by_leaf], n=1)
    hint = f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(sorted(by_leaf))}"
    raise InputError(f"unknown config key `{key}`{hint}")


def build_config(
    config: type[ConfigT], file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> ConfigT:
    """Defaults, then the YAML `file`, then `overrides` (leaf or dotted name -> value or its text).

    Raises:
        InputError: file missing or not YAML, unknown key, or a value out of range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_flatten(_read_yaml(Path(file)), config))
    values.update((resolve_key(config, key), value) for key, value in (overrides or {}).items())
    known = dict(leaves(config))
    tree = config().model_dump()  # whole sections: a command may have its own defaults for one
    for path, value in values.items():
        _place(tree, path, _read_text(path, value, known[path]))
    try:
        return config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"config key `{where}`: {first['msg']} (got {first['input']!r})") from error


def save_config(config: Section, path: Path) -> None:
    """Write the resolved settings as YAML, every default included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _read_yaml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"config file {path} does not exist")
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise InputError(f"config file {path} must hold `key: value` lines, not a {type(tree).__name__}")
    return tree


def _parse(text: str) -> Any:
    """Text, lists and mappings, nothing else: types are the leaves' business."""
    return yaml.load(text, Loader=yaml.BaseLoader)


def _flatten(tree: Mapping[str, Any], config: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, config, f"{path}.")
        else:
            yield resolve_key(config, path), value


def _read_text(path: str, value: Any, info: FieldInfo) -> Any:
    """The three shapes that text alone does not show: nothing, a list, and the word `none` of `lora` and `adapter`."""
    if not isinstance(value, str):
        return value
    if is_optional(info):
        keeps_none = path in ("model.lora", "model.adapter")  # there `none` means: load none, not even the default
        if value.lower() in ("", "null", "~") or (value.lower() == "none" and not keeps_none):
            return None
    if not is_tuple(info):
        return value
    try:
        return _parse(value) if value.startswith("[") else (value,)
    except yaml.YAMLError as error:
        raise InputError(f"config key `{path}`: {value} is not a list such as [a, b]") from error


def is_optional(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation)


def is_tuple(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is tuple


def _place(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value
