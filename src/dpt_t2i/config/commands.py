"""One config a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dpt_t2i.config.sections import (
    ATLAS_ADAPTER,
    AdapterConfig,
    AtlasConfig,
    BaseModelConfig,
    CorrectionConfig,
    DataConfig,
    DataFormat,
    DenoiseConfig,
    DistillConfig,
    ItmRecConfig,
    LoraSettings,
    ModelConfig,
    Positive,
    SampleConfig,
    SamplesConfig,
    SearchConfig,
    Section,
    Seed,
    StoredModelConfig,
    TrainConfig,
    TrainDataConfig,
    TrainModelConfig,
    TuneTrainConfig,
)
from dpt_t2i.errors import InputError


class _RunConfig(Section):
    """A run of either stage."""

    output_dir: Path
    run_name: str = Field("", description="folder of this run below output_dir, and its name at the tracker")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output_dir / self.run_name


class ProbeConfig(_RunConfig):
    """Stage 1: probing. The denoiser is frozen, the adapter learns."""

    model: TrainModelConfig = TrainModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: TrainDataConfig = TrainDataConfig()
    loss: ItmRecConfig = ItmRecConfig()
    train: TrainConfig = TrainConfig()
    atlas: AtlasConfig = AtlasConfig()
    output_dir: Path = Field(Path("runs/probe"), description="run folder")
    seed: Seed = Field(0, description="seed of weights, noise and timesteps")

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> Self:
        """With `taps` the adapters are small, and `tap` says the same."""
        taps = given.get("atlas.taps")
        if not isinstance(taps, str):
            return cls()
        return cls(model=TrainModelConfig(tap=taps), adapter=ATLAS_ADAPTER, atlas=AtlasConfig(taps=taps))

    @model_validator(mode="after")
    def _taps_are_named_once(self) -> Self:
        if self.atlas.taps is not None and self.model.tap != self.atlas.taps:
            raise InputError(
                f"tap `{self.model.tap}` and taps `{self.atlas.taps}` do not go together: give tap for one adapter, "
                "taps for one at each"
            )
        return self


class TuneConfig(_RunConfig):
    """Stage 2: tuning. LoRA and adapter learn on ITM + REC + denoising."""

    model: TrainModelConfig = TrainModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    lora: LoraSettings = LoraSettings()
    data: TrainDataConfig = TrainDataConfig()
    loss: ItmRecConfig = ItmRecConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    distill: DistillConfig = DistillConfig()
    train: TuneTrainConfig = TuneTrainConfig()
    samples: SamplesConfig = SamplesConfig()
    objective: Literal["dpt", "denoise_itm", "denoise_only"] = Field(
        "dpt",
        description="`denoise_itm` = LoRA on denoising and on what compares its errors, without adapter; "
        "`denoise_only` = the control arm: LoRA on the denoising loss alone",
    )
    output_dir: Path = Field(Path("runs/tune"), description="run folder")
    seed: Seed = Field(0, description="seed of weights, noise and timesteps")


class GenerateConfig(Section):
    """Sample images from prompts."""

    model: ModelConfig = ModelConfig()
    prompt: tuple[str, ...] = Field((), description="prompt; may be given several times")
    prompts_file: Path | None = Field(
        None, description="text file (a prompt a line), or .jsonl, .tsv, .csv with `prompt` or `caption`"
    )
    seeds: str = Field("0", description="`0`, `0,3,7` or `0-3`")
    own_noise: bool = Field(False, description="a seed is another noise for every prompt, not one for all of them")
    height: int | None = Field(None, description="pixels; default: the model's own")
    width: int | None = Field(None, description="pixels; default: the model's own")
    sample: SampleConfig = SampleConfig()
    correction: CorrectionConfig = CorrectionConfig()
    search: SearchConfig = SearchConfig()
    output_dir: Path = Field(Path("runs/generate"), description="generation folder")
    seed: Seed = Field(0, description="seed of scoring noise; images take theirs from --seeds")


class ScoreConfig(Section):
    """Score an image against a prompt."""

    model: ModelConfig = ModelConfig()
    score_timestep: int = Field(250, ge=0, description="timestep of the judged latent")
    score_draws: Positive = Field(4, description="noises averaged")
    output_dir: Path = Field(Path("runs/score"), description="where the annotated PNG goes")
    seed: Seed = Field(0, description="seed of the noise")


class AlignmentConfig(Section):
    """Do the images obey their prompts? Paired arms over one prompt suite."""

    model: ModelConfig = ModelConfig()
    suite: Literal["dev", "test_seen", "test_heldout"] = Field("dev", description="prompt suite of the drawn scenes")
    arms: tuple[str, ...] = Field(
        ("base", "dpt", "dpt_correct"), description="arm of the comparison; may be given several times"
    )
    seeds: str = Field("0-1", description="`0`, `0,3,7` or `0-3`; the same for every arm")
    own_noise: bool = Field(
        True, description="a seed is another noise for every prompt; else few noises decide, and no interval tells"
    )
    max_prompts: Annotated[int, Field(gt=0)] | None = Field(
        None, description="use only N prompts, in turn from each category"
    )
    control_lora: Path | None = Field(None, description="LoRA of the control arm (denoising loss alone)")
    control_compute_lora: Path | None = Field(None, description="LoRA of the control arm with equal compute")
    onpolicy_lora: Path | None = Field(None, description="LoRA tuned on its own samples; its adapter lies beside it")
    live_lora: Path | None = Field(None, description="LoRA just made, beside what ships; its adapter lies beside it")
    probe_adapter: Path | None = Field(
        None, description="adapter that corrects the plain base; default: what ships with the base"
    )
    sample: SampleConfig = SampleConfig()
    correction: CorrectionConfig = CorrectionConfig()
    search: SearchConfig = SearchConfig()
    bootstrap_draws: Positive = Field(10_000, description="resamples of a confidence interval")
    test_log: Path | None = Field(
        None,
        description="file that gets a line for each run on a test suite; default: test_runs.jsonl beside the folder",
    )
    output_dir: Path = Field(Path("runs/alignment"), description="evaluation folder; finished images are reused")
    seed: Seed = Field(0, description="seed of scoring noise and resampling; images take theirs from --seeds")


class DiscriminationConfig(Section):
    """Image-text matching and grounding accuracy of an adapter."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    timesteps: tuple[int, ...] = Field(
        (500, 250), description="timestep of the judged latent; may be given several times"
    )
    eval_batch_size: Positive = Field(32, description="examples at once; never changes a score")
    all_expressions: bool = Field(
        False, description="grounding: every expression of a record, as RefCOCO counts; off = one a record"
    )
    output_dir: Path = Field(Path("runs/discrimination"), description="evaluation folder")
    seed: Seed = Field(0, description="seed of the noise, shared by an example's positive and negatives")


class ImageScoresConfig(Section):
    """Do generated images go with their prompts? Outside encoders (CLIP, SigLIP, BLIP) score folders, pair by pair."""

    folders: tuple[Path, ...] = Field(
        (), description="generation folder of `dpt generate`; give each, the one to compare with first"
    )
    scorers: tuple[str, ...] = Field(
        ("bundled",),
        description="folder or hub id of CLIP, SigLIP or BLIP (image-text retrieval); may be given several times; "
        "`bundled` knows the drawn world alone",
    )
    prompts_file: Path | None = Field(None, description="file of the prompts, which says the category of each")
    trained_on: tuple[Path, ...] = Field(
        (), description="data set of the compared runs: warns where a scorer also mined its hard negatives"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    encode_batch_size: Positive = Field(32, description="images in one pass: memory only")
    bootstrap_draws: Positive = Field(10_000, description="resamples of a confidence interval")
    output_dir: Path = Field(Path("runs/image_scores"), description="evaluation folder")
    seed: Seed = Field(0, description="seed of the resampling")


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
    seed: Seed = Field(0, description="seed of training and of scoring noise; images take theirs from --seeds")


class ExportConfig(Section):
    """Write LoRA and adapter as the files that diffusers, ComfyUI and A1111 load."""

    model: StoredModelConfig = StoredModelConfig()
    format: Literal["diffusers", "kohya", "merged"] = Field(
        "diffusers",
        description="`diffusers`: pytorch_lora_weights.safetensors; `kohya`: for ComfyUI and A1111; "
        "`merged`: the whole base with the LoRA in its weights",
    )
    title: str | None = Field(None, description="name of the model; default: the base's with `-dpt`")
    license: str | None = Field(None, description="license of the weights, such as openrail++; default: not stated")
    usage_hint: str = Field("weight 1.0, no trigger word", description="a line for users of the kohya file")
    alignment: Path | None = Field(None, description="alignment.json of `dpt evaluate alignment`, shown in the card")
    itm: Path | None = Field(None, description="itm.json of `dpt evaluate itm`, shown in the card")
    rec: Path | None = Field(None, description="rec.json of `dpt evaluate rec`, shown in the card")
    output_dir: Path = Field(Path("runs/export"), description="folder to publish")


class PerturbConfig(Section):
    """Give every caption of an imagefolder hard-negative captions made by rule, without any model."""

    dataset: Path = Field(Path("runs/scenes"), description="imagefolder with metadata.jsonl")
    rules: tuple[str, ...] = Field(
        (), description="rule that may be used; may be given several times; default: all (docs/negatives.md)"
    )
    per_caption: Positive = Field(1, description="negatives of a caption, of different rules, swaps and flips first")
    output_dir: Path | None = Field(None, description="copy of the folder to make; default: the folder's own metadata")
    seed: Seed = Field(0, description="seed of the choice among the ways in which a rule applies")


class MineConfig(Section):
    """Mine hard negatives by an encoder: an imagefolder's own captions and images that come nearest."""

    dataset: Path = Field(Path("runs/scenes"), description="imagefolder with metadata.jsonl, which is added to")
    encoder: str = Field("bundled", description="`bundled`, or a folder or hub id of CLIP or SigLIP")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    top_k: Positive = Field(3, description="negatives of each image and of each caption")
    duplicate_cosine: float = Field(
        0.95, gt=0, le=1, description="two images, or two captions, above it are the same thing, and no negatives"
    )
    search: Literal["auto", "exact", "faiss"] = Field(
        "auto",
        description="compare all pairs, or those that an index of faiss (extra `faiss`) proposes; auto = exact below "
        "200,000 records or without faiss",
    )
    encode_batch_size: Positive = Field(32, description="images or texts in one pass: memory only")
    output_dir: Path = Field(
        Path("runs/mine"), description="folder of embeddings and finds, from which a stopped run goes on"
    )


class CacheConfig(Section):
    """Encode images and texts once for probe and tune; any number of processes may fill one cache."""

    model: BaseModelConfig = BaseModelConfig()
    data: TrainDataConfig = TrainDataConfig(cache_dir=Path("runs/cache"))
    block_size: Positive = Field(128, description="records that a process takes at once, and that share a file")
    vae_batch_size: Positive = Field(8, description="images in one pass of the VAE: memory only")

    @property
    def folder(self) -> Path | None:
        """Where it writes."""
        return self.data.cache_dir


class AppConfig(Section):
    """A web page: draw beside the plain base, with boxes, scores and the way there; judge pictures of your own."""

    model: ModelConfig = ModelConfig()
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 = reachable from other machines")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(7860, description="port; 0 = any that is free")
    output_dir: Path = Field(Path("runs/app"), description="folder that keeps every image, with its settings")


class DoctorConfig(Section):
    """What this machine offers, and whether the model loads on it."""

    model: ModelConfig = ModelConfig()


class InspectConfig(Section):
    """Look at a data set: counts, sizes, everything suspicious, and a contact sheet with boxes and expressions."""

    dataset: str = Field("scenes", description="`scenes`, or the folder of the data; a hub id with huggingface")
    data_format: DataFormat = Field("auto", description="how the data are written; auto = scenes or an imagefolder")
    image_root: Path | None = Field(None, description="folder of the images; default: looked for inside dataset")
    annotations: tuple[Path, ...] = Field(
        (), description="annotation file or shard; may be given several times; default: those in dataset"
    )
    split: str = Field("train", description="split to look at, in the source's own words")
    max_samples: Annotated[int, Field(gt=0)] | None = Field(None, description="look at the first N records only")
    sheet_samples: Positive = Field(24, description="records on the contact sheet, spread over all")
    sheet_size: Annotated[int, Field(ge=32)] = Field(192, description="pixels of a picture on the contact sheet")
    output_dir: Path = Field(Path("runs/inspect"), description="folder for inspection.json and contact_sheet.png")


class ImportOfficialConfig(Section):
    """Turn a checkpoint of the authors' release into our adapter folder and LoRA file."""

    pretrained_model_name_or_path: str = Field(
        "bundled", description="base that the checkpoint was trained on: diffusers folder or hub id"
    )
    revision: str | None = Field(None, description="git revision of a hub model")
    tap: str = Field("up1", description="the release's feature: a block, several joined with `_`, or all-CHANNELS-SIZE")
    num_heads: Positive = Field(8, description="attention heads of the adapter; the checkpoint does not tell")
    num_queries_matching: Positive = Field(10, description="matching queries; the checkpoint does not tell")
    grounding_text: str = Field("roberta-base", description="caption encoder of grounding: RoBERTa folder or hub id")
    device: str = Field("cpu", description="auto, cpu, cuda, cuda:1, mps")
    output_dir: Path = Field(Path("runs/official"), description="folder for adapter/ and the LoRA file")
