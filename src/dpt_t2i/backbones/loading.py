"""From a name to a backbone: the bundled model, a diffusers folder, or a hub id, all on the same path.

A base folder may carry what was learned on it, and `shipped_artifacts` finds it:

    dpt/tuned/pytorch_lora_weights.safetensors   stage 2's LoRA
    dpt/tuned/adapter/                           the adapter that was trained with it
    dpt/probe/adapter/                           stage 1's adapter, for the plain base
"""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dpt_t2i.backbones.flux import FluxBackbone
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora import LORA_FILE
from dpt_t2i.backbones.pixart_sigma import PixArtSigmaBackbone
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.backbones.stable_diffusion_3 import StableDiffusion3Backbone
from dpt_t2i.backbones.stable_diffusion_xl import StableDiffusionXLBackbone
from dpt_t2i.config import PublishedSampling, build_config
from dpt_t2i.errors import InputError

BUNDLED = "bundled"
SAMPLING = Path("dpt") / "sampling.json"  # of a base's folder: what its publisher found best
HUB_ID = re.compile(r"[\w\-]+(\.[\w\-]+)*/[\w\-.]+")
CHECKERS = ("safety_checker", "feature_extractor")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LFS_POINTER = b"version https://git-lfs"
WEIGHT_SUFFIXES = (".safetensors", ".bin")
_SHARD = r"(?:-\d{5}-of-\d{5})?"
_VARIANT = re.compile(rf"[^.]+{_SHARD}\.(?P<variant>\w+){_SHARD}\.(?:safetensors|bin)")  # model.fp16.safetensors


def load_backbone(
    name_or_path: str | Path, revision: str | None = None, device: str = "auto", dtype: str = "float32"
) -> Backbone:
    """A text-to-image model, frozen and in eval mode.

    Args:
        name_or_path: `bundled`, a diffusers folder, or a hub id.
        revision: git revision of a hub model.
        dtype: of the frozen weights; everything that the backbone returns is float32.

    Raises:
        InputError: folder missing; a model file missing or truncated (names it); a family, VAE, kind of denoiser or
            dtype that is not supported; a `dpt/sampling.json` that is not one.
    """
    folder = base_folder(name_or_path, revision)
    family = str(_read_index(folder).get("_class_name"))
    if family not in FAMILIES:
        raise InputError(f"{folder}: pipeline class {family} is not supported; supported: {', '.join(FAMILIES)}")
    backbone, options = FAMILIES[family]
    if dtype not in DTYPES:
        raise InputError(f"dtype `{dtype}` is unknown; give {', '.join(DTYPES)}")
    published = _published_sampling(folder / SAMPLING)
    pipeline = read_pipeline(folder, family, DTYPES[dtype], options).to(resolve_device(device))
    made = _checked(backbone(pipeline, _display_name(name_or_path)))
    made.eta, made.guidance_interval = published.eta, (published.guidance_start, published.guidance_end)
    if published.guidance_scale is not None:
        made.guidance_scale = published.guidance_scale
    return made


def backbone_of(pipeline: Any) -> Backbone:
    """A backbone around a diffusers pipeline that is in memory already; its modules are frozen and used in place.

    Raises:
        InputError: a family that is not supported, naming those that are.
    """
    kind = type(pipeline).__name__
    family = _KINDS.sub("", kind)
    if family not in FAMILIES:
        raise InputError(
            f"pipelines of class {kind} are not supported; supported: {', '.join(FAMILIES)}, and their Img2Img, "
            "Inpaint and ControlNet kinds"
        )
    source = str(getattr(pipeline, "name_or_path", "") or "")
    return _checked(FAMILIES[family][0](pipeline, _display_name(source) if source else kind))


def _checked(backbone: Backbone) -> Backbone:
    """Refuse what the families' own pipelines take and the method does not. Raises `InputError`."""
    vae, name = backbone.pipeline.vae, backbone.name
    if not hasattr(vae.config, "latent_channels") or not hasattr(vae, "quant_conv"):
        raise InputError(f"the VAE of {name} is a {type(vae).__name__}, which gives no posterior; use an AutoencoderKL")
    if backbone.latent_channels != vae.config.latent_channels:
        raise InputError(
            f"the denoiser of {name} takes {backbone.latent_channels} channels and the VAE gives "
            f"{vae.config.latent_channels}: one that was trained with a mask or a picture as input cannot be judged by "
            "latents alone"
        )
    if getattr(backbone.denoiser, "config", {}).get("time_cond_proj_dim") is not None:
        raise InputError(
            f"the denoiser of {name} was distilled with the guidance scale as an input (LCM, `time_cond_proj_dim`), "
            "which is not supported; use the model that it was distilled from"
        )
    return backbone


def base_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The diffusers folder of a base, downloaded if it is a hub id.

    Raises:
        InputError: there is none, or a folder is given with a `revision`.
    """
    name = str(name_or_path)
    folder = Path(str(files("dpt_t2i") / "bundled" / "base")) if name == BUNDLED else Path(name).expanduser()
    if (folder / "model_index.json").is_file():
        if revision is not None:
            raise InputError(f"revision {revision} is one of a model on the hub, and {name} is a folder; leave it out")
        return folder
    if name == BUNDLED:
        raise InputError("the bundled model is missing from this installation; reinstall dpt-t2i")
    if folder.exists() or not HUB_ID.fullmatch(name):
        if folder.is_file():
            raise InputError(
                f"base model {name} is one file; write it out once as a folder, in Python, with its family's pipeline: "
                f'`StableDiffusionPipeline.from_single_file("{name}").save_pretrained("FOLDER")`'
            )
        what = "holds no model_index.json" if folder.exists() else "does not exist"
        raise InputError(f"base model {name} {what}; give a diffusers folder, a hub id, or `{BUNDLED}`")
    return _download(name, revision)


def shipped_artifacts(
    base: str | Path, with_lora: bool = True, revision: str | None = None
) -> tuple[Path | None, Path | None]:
    """(LoRA file, adapter folder) that ship inside a base's folder; None for what is not there.

    Without the LoRA the adapter is the probe's: the tuned one was trained together with it.
    """
    folder = base_folder(base, revision) / "dpt"
    lora = folder / "tuned" / LORA_FILE
    if with_lora and lora.is_file():
        return lora, _if_folder(folder / "tuned" / "adapter")
    return None, _if_folder(folder / "probe" / "adapter")


def choose_artifacts(
    base: str | Path, lora: str | None, adapter: str | None, revision: str | None = None
) -> tuple[Path | None, Path | None]:
    """The LoRA and adapter that the settings of the same names mean: None = what ships, `none` = none, else a path.

    Beside a LoRA given by path, a default adapter is the one in its own run folder, if any.
    """
    shipped_lora, shipped_adapter = shipped_artifacts(base, lora != "none", revision)
    chosen_lora = shipped_lora if lora is None else _path_or_none(lora)
    if adapter is not None:
        return chosen_lora, _path_or_none(adapter)
    if lora is None or lora == "none":
        return chosen_lora, shipped_adapter
    run = Path(lora) if Path(lora).is_dir() else Path(lora).parent
    return chosen_lora, _if_folder(run / "adapter")


def resolve_device(name: str) -> torch.device:
    """`auto` = CUDA, else MPS, else the CPU; otherwise the named device.

    A bare number is that CUDA device, and `auto` on a machine without CUDA (the release's `--gpuid`).

    Raises:
        InputError: no such device here.
    """
    if name.isdecimal():
        name = f"cuda:{name}" if torch.cuda.is_available() else "auto"
    if name == "auto":
        fallback = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else fallback)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device `{name}` is unknown; give auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device `{name}` is not here: {torch.cuda.device_count()} CUDA devices found; give auto or cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device `mps` is not here; give auto or cpu")
    return device


# Of a family's pipelines those that call the denoiser as text to image does.
_KINDS = re.compile("ControlNet|Img2Img|Inpaint")

# The safety checker is not part of the method, and would blacken images unseen.
_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

# Pipeline class of `model_index.json` -> its backbone, and what `from_pretrained` is told beside the folder.
FAMILIES: dict[str, tuple[Callable[[Any, str], Backbone], dict[str, Any]]] = {
    "StableDiffusionPipeline": (StableDiffusionBackbone, _NO_CHECKER),
    "StableDiffusionXLPipeline": (StableDiffusionXLBackbone, {"add_watermarker": False}),
    "PixArtSigmaPipeline": (PixArtSigmaBackbone, {}),
    "StableDiffusion3Pipeline": (StableDiffusion3Backbone, {}),
    "FluxPipeline": (FluxBackbone, {}),
}


def read_pipeline(
    folder: Path, pipeline_class: str, dtype: torch.dtype = torch.float32, options: Mapping[str, Any] | None = None
) -> Any:
    """A diffusers pipeline of a folder in `dtype`, but for weights that their library keeps in float32 (some of T5's).

    Args:
        pipeline_class: its name in diffusers.
        options: further ones of `from_pretrained`.

    Raises:
        InputError: a file is missing, cut short or of another library's making; names it.
    """
    _check_files(folder)
    how: dict[str, Any] = {"local_files_only": True, **(options or {})}
    if (variant := _variant(folder)) is not None:
        how["variant"] = variant
    with quietly(), warnings.catch_warnings():
        import diffusers  # here, where its notes are kept quiet

        how |= absent_texts(folder)
        warnings.simplefilter("ignore", FutureWarning)  # the old name of `dtype`, which diffusers 0.35 knows alone
        how["dtype" if diffusers.__version__.startswith("1.") else "torch_dtype"] = dtype
        try:
            pipeline = getattr(diffusers, pipeline_class).from_pretrained(folder, **how)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise InputError(f"base model {folder} does not load: {str(error).strip().splitlines()[0]}") from error
        except (EOFError, UnpicklingError) as error:
            raise InputError(f"base model {folder} has a damaged file of weights; fetch it again") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _variant(folder: Path) -> str | None:
    """Such as `fp16` where a part has its weights under that name alone (`model.fp16.safetensors`)."""
    for name, entry in _read_index(folder).items():
        if not isinstance(entry, list) or not (folder / name).is_dir():
            continue
        found = [_VARIANT.fullmatch(file.name) for file in _weight_files(folder / name)]
        named = [match["variant"] for match in found if match is not None]
        if named and len(named) == len(found):
            return named[0]
    return None


def absent_texts(folder: Path) -> dict[str, None]:
    """What `from_pretrained` must be told of text encoders and tokenizers that a folder lacks, as SD 3 often its T5.

    What a backbone cannot do without, it asks for itself.
    """
    import diffusers

    index = _read_index(folder)
    pipeline_class = getattr(diffusers, str(index["_class_name"]))
    texts = [name for name in signature(pipeline_class).parameters if name.startswith(("text_encoder", "tokenizer"))]
    absent = {name: None for name in texts if None in (index.get(name) or [None])}
    # Named in the index, and not there: many delete the checker, which is not part of the method.
    return absent | {name: None for name in CHECKERS if name in index and not (folder / name).is_dir()}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars for a load of seconds, and no notes about image processors that a T2I model never uses."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    parts = (diffusers_logging, transformers_logging)
    before = [(part.get_verbosity(), part.is_progress_bar_enabled()) for part in parts]
    for part in parts:
        part.set_verbosity_error()
        part.disable_progress_bar()
    try:
        yield
    finally:
        for part, (verbosity, progress) in zip(parts, before, strict=True):
            part.set_verbosity(verbosity)
            if progress:
                part.enable_progress_bar()


def _published_sampling(file: Path) -> PublishedSampling:
    """What a base's folder says about sampling; nothing where there is no such file."""
    if not file.is_file():
        return PublishedSampling()
    try:
        return build_config(PublishedSampling, file)  # JSON is YAML
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _read_index(folder: Path) -> dict[str, Any]:
    return read_json(folder / "model_index.json")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a base model's folder; raises `InputError` naming it."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"base model file {file} is missing or broken ({error}); fetch it again") from error
    return content


def _check_files(folder: Path) -> None:
    """Name the file that is missing or cut short, before the libraries say something vaguer or nothing at all."""
    for name, entry in _read_index(folder).items():
        kind = name.rstrip("_23")
        if not isinstance(entry, list) or None in entry:
            continue  # no component, or an optional one that is not there
        if kind in ("unet", "transformer", "vae", "text_encoder"):
            _check_part(folder / name)
        elif kind == "scheduler":
            read_json(folder / name / "scheduler_config.json")
        elif kind == "tokenizer":
            _check_tokenizer(folder / name)


def _weight_files(part: Path) -> list[Path]:
    return [file for file in sorted(part.glob("*")) if file.suffix in WEIGHT_SUFFIXES]


def _check_part(part: Path) -> None:
    read_json(part / "config.json")
    weights = _weight_files(part)
    if not weights:
        raise InputError(f"base model {part} holds no weights (*.safetensors); fetch it again")
    plain = [file for file in weights if _VARIANT.fullmatch(file.name) is None]
    for file in plain or weights:  # beside plain weights, a variant is not read and may be a pointer
        _check_weights(file)


def _check_tokenizer(part: Path) -> None:
    """Without its vocabulary transformers makes an empty tokenizer and says nothing."""
    if any((part / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        return
    for name in ("vocab.json", "merges.txt"):
        if not (part / name).is_file():
            raise InputError(f"base model file {part / name} is missing; fetch it again")


def _check_weights(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
    if start in (b"", LFS_POINTER):
        kind = "is empty" if not start else "is a pointer of git-lfs, not the weights (`git lfs pull` fetches them)"
        raise InputError(f"base model file {file} {kind}; fetch it again")
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"base model file {file} is truncated or broken ({error}); fetch it again") from error


def _download(name: str, revision: str | None) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    try:
        folder = Path(DiffusionPipeline.download(name, revision=revision))
        if not any(map(_weight_files, folder.iterdir())):  # repositories that hold half-precision files alone
            folder = Path(DiffusionPipeline.download(name, revision=revision, variant="fp16"))
        snapshot_download(name, revision=revision, allow_patterns="dpt/*")  # no part of a pipeline, but ours
        return folder
    except Exception as error:  # the hub's client raises some twenty kinds: offline, no such model, gated, ...
        reason = textwrap.shorten(str(error), 160)
        raise InputError(
            f"base model {name} is neither a folder nor could it be fetched from the hub: {reason}"
        ) from error


def _display_name(name_or_path: str | Path) -> str:
    """What messages and headers call the base; of a folder only the last part, so that no private path is saved."""
    path = Path(name_or_path).expanduser()
    return path.resolve().name if path.exists() else str(name_or_path)


def _path_or_none(text: str) -> Path | None:
    return None if text == "none" else Path(text)


def _if_folder(path: Path) -> Path | None:
    return path if path.is_dir() else None
