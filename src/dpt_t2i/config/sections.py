"""The parts that commands are configured with; each stands once, whatever commands share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from dpt_t2i.errors import InputError

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no larger one
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
DataFormat = Literal[
    "auto", "scenes", "imagefolder", "coco", "refcoco", "mdetr", "hard_negatives", "webdataset", "huggingface"
]


class Section(BaseModel):
    """Base of every section and command config: frozen, and nothing unknown passes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> Self:
        """What holds where nothing was said; a key of `given` (dotted path -> value) may choose between defaults."""
        return cls()


class StoredBaseConfig(Section):
    """A base model as files."""

    pretrained_model_name_or_path: str = Field("bundled", description="diffusers folder, hub id, or `bundled`")
    revision: str | None = Field(None, description="git revision of a hub model")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the frozen weights")


class BaseModelConfig(StoredBaseConfig):
    """A base model on a device."""

    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:1, mps; a bare number is that GPU, or `auto` where there is none"
    )


class LearnedConfig(Section):
    """What was learned on a base model."""

    lora: str | None = Field(
        None, description="LoRA file or folder; `none` = plain base; default: what ships with the base"
    )
    adapter: str | None = Field(
        None, description="adapter or run folder; `none` = no adapter; default: what ships with the base"
    )


class StoredModelConfig(LearnedConfig, StoredBaseConfig):
    """Base, LoRA and adapter as files."""


class ModelConfig(LearnedConfig, BaseModelConfig):
    """Base, LoRA and adapter on a device."""


class TrainModelConfig(ModelConfig):
    lora: str | None = Field("none", description="LoRA to start from; `none` = plain base")
    adapter: str | None = Field(
        "none",
        description="start from this adapter (stage 2 needs that of stage 1): an adapter or run folder, or the "
        "pytorch_model.bin of the release",
    )
    tap: str | None = Field(
        None,
        description="block whose features are read; join several with `_`, or `all-<channels>-<size>`; default: that "
        "of the adapter to start from, else the paper's `up1`",
    )


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
    position_values: bool = Field(
        False, description="add place and timestep to the features too, as in the paper's figure; the release does not"
    )
    fusion_channels: Annotated[int, Field(gt=0)] | None = Field(
        None, description="width at which several taps are summed before the projection; tap `all-<channels>-<size>`"
    )
    fusion_size: Annotated[int, Field(gt=0)] | None = Field(
        None, description="side of the square map that they are summed at; tap `all-<channels>-<size>`"
    )
    max_map_size: Annotated[int, Field(gt=0)] | None = Field(
        None, description="average larger maps down to so many places a side before anything else; default: never"
    )
    grounding_text: str = Field(
        "denoiser", description="`denoiser` = the T2I model's own text encoder, or a RoBERTa folder / hub id"
    )


# The small adapter that each tap of an atlas gets, where the config names no other sizes.
ATLAS_ADAPTER = AdapterConfig(
    hidden_dim=64, num_heads=4, dim_feedforward=256, dropout=0.0, num_queries_rec=20, max_map_size=8
)


class AtlasConfig(Section):
    """Stage 1 on many taps at once: what does each of them tell, at which timestep?"""

    taps: str | None = Field(
        None,
        description="in place of tap: give each of these taps a small adapter of its own, all read from one pass; "
        "`all`, or names joined with `_`",
    )
    timestep_buckets: Positive = Field(10, description="equal parts of the timesteps, each measured at its middle")


SceneCategory = Literal[  # as `dpt_t2i.scenes.language.Category`, which this room may not import
    "single_object", "two_objects", "counting", "colors", "position", "color_attribution", "several"
]


class DataConfig(Section):
    dataset: str = Field(
        "scenes",
        description="`scenes`, or the folder of the data; a hub id with huggingface; with streaming also shards, such "
        "as https://host/train-{000..127}.tar",
    )
    data_format: DataFormat = Field(
        "auto", description="how the data are written; auto = `scenes` or an imagefolder with metadata.jsonl"
    )
    image_root: Path | None = Field(None, description="folder of the images; default: looked for inside dataset")
    annotations: tuple[Path, ...] = Field(
        (), description="annotation file or shard to train on; may be given several times; default: those in dataset"
    )
    val_annotations: tuple[Path, ...] = Field(
        (), description="the same of the held-out records; default: those in dataset, else the tail is held out"
    )
    train_split: str = Field("train", description="split that is trained on, in the source's own words")
    val_split: str = Field("val", description="split that is held out, such as testA of RefCOCO")
    exclude_refs: tuple[Path, ...] = Field(
        (),
        description="refs(*).p whose val and test images, or MDETR file whose images, are kept out of training; "
        "may be given several times",
    )
    on_bad: Literal["error", "skip"] = Field("error", description="end at a broken record, or leave it out and count")
    streaming: bool = Field(
        False,
        description="webdataset: read shards from front to back as training goes; huggingface: fetch the first "
        "max_samples rows without a download",
    )
    resolution: Annotated[int, Field(gt=0)] | None = Field(
        None, description="pixels of the square image given to the VAE; default: the model's own size"
    )
    dataloader_num_workers: int = Field(
        0,
        ge=0,
        description="loader processes; changes what is seen of streamed shards alone, which are dealt out to them",
    )
    data_seed: Seed = Field(0, description="seed of the example order and of every random choice in the data")
    scene_categories: tuple[SceneCategory, ...] = Field(
        (),
        description="scenes: train on these in turn, as often as each stands here; default: the world's own mix",
    )
    max_samples: Annotated[int, Field(gt=1)] | None = Field(None, description="use only the first N records")
    val_samples: Positive = Field(256, description="held-out examples of a validation")


class TrainDataConfig(DataConfig):
    center_crop: bool = Field(True, description="crop the middle, moved where a box asks for it; off = anywhere")
    aspect_buckets: bool = Field(
        False, description="fit pictures to shapes from 1:2 to 2:1 instead of squares, one shape a step"
    )
    random_flip: bool = Field(False, description="mirror half of the examples whose texts name no side")
    shuffle_buffer: Annotated[int, Field(gt=1)] = Field(
        1000, description="streamed shards: records that a stream keeps in memory and shows in random order"
    )
    cache_dir: Path | None = Field(
        None, description="folder that `dpt data cache` filled; what is not in it is encoded as it comes"
    )
    cache_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float16", description="dtype of latents and text states in the cache"
    )


class ItmRecConfig(Section):
    """Weights of the losses (method.md section 3)."""

    itm_coef: float = Field(1.0, ge=0, description="image-text matching, both directions")
    ce_coef: float = Field(1.0, ge=0, description="soft-token cross entropy")
    bbox_coef: float = Field(5.0, ge=0, description="L1 of boxes")
    giou_coef: float = Field(2.0, ge=0, description="generalised IoU of boxes")
    align_coef: float = Field(1.0, ge=0, description="contrastive alignment of queries and tokens")
    eos_coef: float = Field(0.1, ge=0, description="weight of the no-object class")
    align_temperature: float = Field(0.07, gt=0, description="temperature of the contrastive alignment")
    on_policy_fraction: Fraction = Field(
        0.0, description="share of examples whose hard-negative image is the model's own sample for the caption"
    )
    on_policy_every: Positive = Field(200, description="optimiser steps between refreshes of the pool of own samples")
    on_policy_pool: Positive = Field(256, description="own samples kept in the pool")
    on_policy_steps: Positive = Field(20, description="sampling steps of an own sample")
    on_policy_guidance: float = Field(3.0, ge=0, description="classifier-free guidance of an own sample")
    on_policy_eta: Fraction | None = Field(None, description="fresh noise in each of its steps, as `eta` of generation")


class DenoiseConfig(Section):
    mse_loss_coef: float = Field(1.0, ge=0, description="denoising loss")
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR gamma; none = plain MSE")
    caption_dropout: Fraction = Field(0.1, description="share of captions emptied in the denoising term")
    detach_unet_feature: str | None = Field(
        None,
        description="block behind which the denoising loss sends no gradient into the map (the adapter's losses do)",
    )
    denoise_itm_coef: float = Field(
        0.0, ge=0, description="weight of telling the caption from its hard negative by the denoising error; 0 = off"
    )
    denoise_itm_temperature: float = Field(
        0.1, gt=0, description="temperature of that, for the difference of the errors as a share of the caption's own"
    )
    denoise_itm_min_timestep: int = Field(300, ge=0, description="lowest timestep at which that is asked")
    denoise_dpo_coef: float = Field(
        0.0, ge=0, description="weight of preferring, under a caption, its picture to the hard negative's; 0 = off"
    )
    denoise_dpo_temperature: float = Field(
        0.1, gt=0, description="temperature of that, for the change of the errors as a share of the base's own error"
    )
    denoise_dpo_min_timestep: int = Field(300, ge=0, description="lowest timestep at which that is asked")


class DistillConfig(Section):
    """Stage 2 beyond the paper: the LoRA learns to predict what the base would after a self-correction."""

    distill_coef: float = Field(
        0.0, ge=0, description="weight of predicting as the base corrected by stage 1's adapter would; 0 = off"
    )
    distill_strength: float = Field(
        0.3, ge=0, description="length of that correction in the clean latent, relative to the latent, times sigma_t"
    )
    distill_adapter: Path | None = Field(
        None, description="adapter of the plain base whose score corrects; default: the one that training starts from"
    )
    distill_min_timestep: int = Field(
        500, ge=0, description="lowest corrected timestep; below it the plain base is what is predicted"
    )


class LoraSettings(Section):
    rank: Positive = Field(4, description="LoRA rank")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA alpha; default: the rank, so that the scale is 1")
    lora_scope: Literal["all", "to_tap"] = Field("all", description="attention of the whole denoiser, or up to the tap")
    lora_itm_rec_share: Fraction = Field(
        1.0,
        description="share of the gradient of ITM and REC that reaches the LoRA; 0 = they teach the adapter alone",
    )


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
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="at a loss or gradient that is not finite: end the run, or leave the step out and count it"
    )
    use_8bit_adam: bool = Field(False, description="AdamW with 8-bit moments; needs the extra `8bit` (bitsandbytes)")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(
        None, description="autocast of the denoiser and adapter; default: what `accelerate launch` says, else `no`"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations of the denoiser")
    enable_xformers_memory_efficient_attention: bool = Field(
        False, description="understood for the release's sake: attention runs in PyTorch's fused kernels in any case"
    )
    vae_batch_size: Positive = Field(8, description="images in one pass of the VAE: memory only")
    checkpointing_steps: Positive = Field(500, description="steps between checkpoints")
    checkpoints_total_limit: Positive = Field(2, description="newest checkpoints kept; the best one stays beside them")
    best_metric: str | None = Field(
        None,
        description="held-out figure of the best checkpoint (of a loss the lowest); default: itm_text, else loss_mse",
    )
    resume_from_checkpoint: str | None = Field(None, description="`latest`, or a checkpoint folder")
    validation_steps: Positive = Field(500, description="steps between validations")
    val_batch_size: Positive = Field(16, description="examples of a validation at once: memory only")
    report_to: str | None = Field(None, description="tensorboard, wandb, trackio: through accelerate")


class TuneTrainConfig(TrainConfig):
    max_train_steps: Positive = Field(5_000, description="optimiser steps")
    train_batch_size: Positive = Field(8, description="examples a device and micro-batch")
    gradient_accumulation_steps: Positive = Field(8, description="micro-batches an optimiser step")
    lr_scheduler: Schedule = Field("cosine", description="rate over steps")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="also keep a running average of the LoRA, such as 0.999, in `ema/`; default: none"
    )


class SamplesConfig(Section):
    """Fixed-seed samples during stage 2: base, tuned, tuned with correction, side by side."""

    sample_every: int = Field(500, ge=0, description="optimiser steps between samples; 0 = none")
    sample_prompts: tuple[str, ...] = Field(
        (), description="prompt of a sample; may be given several times; default: captions of held-out examples"
    )
    sample_count: Positive = Field(4, description="held-out captions that are sampled where no prompt is given")
    sample_steps: Positive = Field(20, description="sampling steps of a sample")
    sample_guidance: Annotated[float, Field(ge=0)] | None = Field(
        None, description="guidance of a sample, as `guidance_scale` of generation"
    )
    sample_eta: Fraction | None = Field(None, description="fresh noise in each of its steps, as `eta` of generation")
    sample_correct: float = Field(0.05, ge=0, description="strength of its correction, relative to the latent")


class SampleConfig(Section):
    """How images are sampled; the same words in `generate` and `evaluate alignment`."""

    steps: Positive = Field(50, description="sampling steps")
    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="classifier-free (1 and less = off) or distilled guidance; default: the base's, or its family's",
    )
    guidance_start: Fraction | None = Field(
        None, description="first guided fraction of the schedule; before it as at scale 1; default: the base's, or 0"
    )
    guidance_end: Fraction | None = Field(
        None, description="last guided fraction of the schedule; behind it as at scale 1; default: the base's, or 1"
    )
    scheduler: Literal["ddim", "euler", "dpm++", "unipc"] = Field("ddim", description="sampler")
    eta: Fraction | None = Field(
        None, description="fresh noise in each step of `ddim`: 0 = none, 1 = as much as DDPM; default: the base's, or 0"
    )
    batch_size: Positive = Field(8, description="images at once, but for corrected ones; never changes an image")
    negative_prompt: str = Field("", description="text of the unconditional branch")
    lora_draws: bool = Field(
        True, description="false: the plain base draws, and the LoRA serves matching, correction and ranking alone"
    )


class PublishedSampling(Section):
    """`dpt/sampling.json` in a base's folder: what its publisher found best, taken where the user says nothing."""

    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(None, description="default: the model family's own")
    guidance_start: Fraction = Field(0.0, description="as in `SampleConfig`")
    guidance_end: Fraction = Field(1.0, description="as in `SampleConfig`")
    eta: Fraction = Field(0.0, description="as in `SampleConfig`")


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
    correction_fused: bool = Field(
        False, description="take the gradient from the pass that predicts the noise; it moves the next latent instead"
    )

    @classmethod
    def check_rule(cls, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """A strength that is stored with an adapter is one of the rule stored beside it.

        Raises:
            InputError: another rule is given, and no strength.
        """
        rule = stored.get("correction_rule", cls().correction_rule)
        if stored and "correct" not in given and given.get("correction_rule", rule) != rule:
            raise InputError("the strength stored with the adapter is of another correction_rule; give `correct` too")


class SearchConfig(Section):
    best_of: Positive = Field(1, description="seeds tried for each image; the best by matching score is kept")
    score_timestep: int = Field(250, ge=0, description="timestep at which candidates are scored")
    score_draws: Positive = Field(2, description="fixed shared noises averaged in a score")
