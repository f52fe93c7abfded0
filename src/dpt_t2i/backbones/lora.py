"""LoRA on the denoiser's attention projections, through PEFT, in the file format that every diffusers user knows.

The header of a file says what it is: `lora_adapter_metadata` (diffusers' own entry; without it alpha is lost) and `dpt`
(our resolved config, the base's fingerprint, versions).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpt_t2i.backbones import peft_only
from dpt_t2i.backbones.fingerprint import check_fingerprint
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError

# Of every attention, self and cross, as in the release; those of the text stream in an MMDiT, as diffusers' scripts.
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT_STREAM = ("add_q_proj", "to_add_out")  # what the texts ask and are told: lost where the text stream ends
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_NAME = "dpt"
HEADER_KEY = "dpt"
DIFFUSERS_HEADER_KEY = "lora_adapter_metadata"


def add_lora(
    backbone: Backbone,
    rank: int,
    alpha: float | None = None,
    scope: Literal["all", "to_tap"] = "all",
    taps: Sequence[Tap] = (),
) -> list[nn.Parameter]:
    """Put a fresh, trainable LoRA on the denoiser; B = 0, so it changes nothing yet.

    Args:
        alpha: scale is `alpha / rank`; default the rank, so that the scale is 1 (the release's).
        scope: `all` attention projections of the denoiser, or `to_tap`: only those that a pass up to `taps` uses.

    Returns:
        The LoRA's parameters, float32 whatever the base's dtype.
    """
    if lora_parameters(backbone):
        raise RuntimeError("the denoiser already has a LoRA; remove_lora first")
    targets = _projections(backbone) if scope == "all" else _projections_up_to(backbone, taps)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",  # A ~ N(0, 1/rank^2), B = 0: the release's initialisation
        target_modules=targets,
    )
    denoiser: Any = backbone.denoiser
    if peft_only.has_lora_methods(denoiser):
        denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
    else:
        inject_adapter_in_model(config, denoiser, ADAPTER_NAME)
    return _to_float32(backbone)


def lora_parameters(backbone: Backbone) -> list[nn.Parameter]:
    """The parameters of the denoiser's LoRA, in the module order; empty without one."""
    return [parameter for name, parameter in backbone.denoiser.named_parameters() if ".lora_" in name]


def remove_lora(backbone: Backbone) -> None:
    """Back to the plain base; nothing happens without a LoRA."""
    if not lora_parameters(backbone):
        return
    if peft_only.has_lora_methods(backbone.denoiser):
        backbone.pipeline.unload_lora_weights()
    else:
        peft_only.remove(backbone.denoiser)


@contextlib.contextmanager
def lora_disabled(backbone: Backbone) -> Iterator[None]:
    """The plain base inside the block; what was trainable before is trainable after (PEFT's switch forgets)."""
    layers = [module for module in backbone.denoiser.modules() if isinstance(module, BaseTunerLayer)]
    trainable = [(parameter, parameter.requires_grad) for parameter in lora_parameters(backbone)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def save_lora(backbone: Backbone, folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors`, which stock `pipe.load_lora_weights(folder)` reads exactly.

    U-Nets get diffusers' names (`lora.down`, `lora.up`), transformers PEFT's (`lora_A`, `lora_B`), as diffusers itself
    writes them. PixArt's pipeline has no `load_lora_weights`: our `load_lora` reads that file.

    Args:
        metadata: the resolved config and whatever else should travel with the weights; plain JSON.
    """
    denoiser: Any = backbone.denoiser
    config = denoiser.peft_config[ADAPTER_NAME]
    state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
    tensors = {_file_key(backbone, key): value.detach().cpu() for key, value in state.items()}
    described = {f"{backbone.denoiser_key}.{key}": value for key, value in config.to_dict().items()}
    ours = {
        "config": dict(metadata),
        "base": backbone.fingerprint(),
        "versions": {
            package: version(package) for package in ("dpt-t2i", "diffusers", "peft", "torch", "transformers")
        },
    }
    header = {
        "format": "pt",
        DIFFUSERS_HEADER_KEY: json.dumps(described, default=sorted, sort_keys=True),  # PEFT's targets are a set
        HEADER_KEY: json.dumps(ours, sort_keys=True),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LORA_FILE
    unfinished = path.with_suffix(".partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, unfinished, metadata=header)
    unfinished.replace(path)  # an interrupted save never leaves half a file under the real name
    return path


def read_lora_header(path: Path) -> dict[str, Any]:
    """Our part of the header (`config`, `base`, `versions`) of a LoRA file or its folder; {} in a foreign file.

    Raises:
        InputError: file missing or truncated.
    """
    _, header = _read(lora_file(path))
    ours: dict[str, Any] = json.loads(header.get(HEADER_KEY, "{}"))
    return ours


def lora_file(path: Path) -> Path:
    """The weight file of a LoRA given by file or folder. Raises `InputError` where there is none."""
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"LoRA {file} does not exist; give a {LORA_FILE} or the folder that holds it")
    return file


def load_lora(backbone: Backbone, path: Path, trainable: bool = False) -> dict[str, Any]:
    """Put the LoRA of a file or folder on the denoiser, in place of any that is there.

    Ours, diffusers', PEFT's and kohya's key names are read. Values are float32, exactly as stored.

    Returns:
        Our part of the header, {} for a foreign file.

    Raises:
        InputError: missing or truncated file, keys or shapes that the denoiser does not know, another architecture.
            Other weights of the same architecture are a warning that names both.
    """
    file = lora_file(Path(path))
    raw, header = _read(file)
    ours: dict[str, Any] = json.loads(header.get(HEADER_KEY, "{}"))
    if "base" in ours:
        check_fingerprint(ours["base"], backbone.fingerprint(), f"LoRA {file}")
    described = json.loads(header[DIFFUSERS_HEADER_KEY]) if DIFFUSERS_HEADER_KEY in header else None
    place_lora(backbone, raw, str(file), ours.get("base", {}).get("name", "unknown"), described, trainable)
    return ours


def place_lora(
    backbone: Backbone,
    tensors: Mapping[str, Tensor],
    source: str,
    made_for: str = "unknown",
    described: Mapping[str, Any] | None = None,
    trainable: bool = False,
) -> None:
    """Put LoRA tensors of any of the key names on the denoiser, float32 and exactly as given.

    Args:
        source, made_for: where they come from and the base they were made for, named in messages.
        described: diffusers' own entry of the file's header; without it and without alphas the scale is 1.

    Raises:
        InputError: keys or shapes that the denoiser does not know, half a pair, or a NaN.
    """
    try:
        state, alphas = _known_names(backbone, tensors)
    except (ValueError, KeyError) as error:  # kohya's names of another family
        raise InputError(f"LoRA {source}: its keys are unknown to `{backbone.name}` ({error})") from error
    peft_state = _checked(backbone, state, source, made_for)
    remove_lora(backbone)
    denoiser: Any = backbone.denoiser
    if peft_only.has_lora_methods(denoiser):
        # diffusers works out ranks and alphas; the values are set again below, as it rounds them to the base's dtype.
        denoiser.load_lora_adapter(
            state,
            prefix=backbone.denoiser_key,
            network_alphas=alphas or None,
            metadata=described,
            adapter_name=ADAPTER_NAME,
        )
    else:
        peft_only.inject_for(denoiser, peft_state, described, backbone.denoiser_key, ADAPTER_NAME)
    parameters = _to_float32(backbone)
    set_peft_model_state_dict(denoiser, peft_state, adapter_name=ADAPTER_NAME)
    for parameter in parameters:
        parameter.requires_grad_(trainable)


def _to_float32(backbone: Backbone) -> list[nn.Parameter]:
    parameters = lora_parameters(backbone)
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def _projections(backbone: Backbone) -> list[str]:
    """All but the text's queries in an attention that drops its answers (`context_pre_only`): they never learn."""
    modules = dict(backbone.denoiser.named_modules())
    ends = tuple(f"{name}." for name, module in modules.items() if getattr(module, "context_pre_only", None) is True)
    return [
        name
        for name in modules
        if name.endswith(PROJECTIONS) and not (name.endswith(TEXT_STREAM) and name.startswith(ends))
    ]


def _projections_up_to(backbone: Backbone, taps: Sequence[Tap]) -> list[str]:
    """Those that count in an early-exit pass: asked of the denoiser, so that it holds for every family.

    Of the block that the pass ends with, the text stream's results are dropped.
    """
    if not taps:
        raise InputError("lora_scope `to_tap` needs a tap")
    ran: list[str] = []
    handles = [
        backbone.denoiser.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        for name in _projections(backbone)
    ]
    side = max(tap.stride for tap in backbone.taps.values()) * 2
    try:
        with torch.no_grad():
            noisy = torch.zeros(1, backbone.latent_channels, side, side, device=backbone.device)
            timesteps = torch.zeros(1, dtype=torch.long, device=backbone.device)
            backbone.features(noisy, timesteps, backbone.null_text(1), taps)
    finally:
        for handle in handles:
            handle.remove()
    last = tuple(f"{tap.module}." for tap in taps if ran[-1].startswith(f"{tap.module}."))
    return [name for name in ran if not (name.endswith(TEXT_STREAM) and name.startswith(last))]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        return load_file(file), header
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"LoRA {file} is truncated or no safetensors file ({error}); fetch it again") from error


def _file_key(backbone: Backbone, peft_key: str) -> str:
    if backbone.denoiser_key == "unet":
        peft_key = peft_key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
    return f"{backbone.denoiser_key}.{peft_key}"


def _known_names(backbone: Backbone, raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under diffusers' or PEFT's names behind `unet.` or `transformer.`, and the alphas of a kohya file."""
    if not peft_only.has_lora_methods(backbone.denoiser):
        own = f"{backbone.denoiser_key}."
        return {key.replace("base_model.model.", own, 1): value for key, value in raw.items()}, {}
    # Kohya numbers the blocks of an XL U-Net in its own way; diffusers asks the config for them.
    config = {"unet_config": backbone.denoiser.config} if backbone.denoiser_key == "unet" else {}
    converted = backbone.pipeline.lora_state_dict(dict(raw), **config)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    return state, alphas or {}


def _checked(backbone: Backbone, state: Mapping[str, Tensor], file: str, made_for: str) -> dict[str, Tensor]:
    """PEFT-named tensors, after making sure that each one has its place and its other half in the denoiser."""
    modules: dict[str, Any] = dict(backbone.denoiser.named_modules())
    peft_state: dict[str, Tensor] = {}
    for key, value in state.items():
        peft_key = _to_peft(key.removeprefix(f"{backbone.denoiser_key}."))
        name, half, _ = peft_key.rpartition(".lora_A.") if ".lora_A." in peft_key else peft_key.rpartition(".lora_B.")
        module = modules.get(name)
        if not half or not key.startswith(f"{backbone.denoiser_key}.") or module is None:
            raise InputError(f"LoRA {file}, made for base `{made_for}`: key `{key}` is unknown to `{backbone.name}`")
        if value.ndim != 2:
            raise InputError(f"LoRA {file}: `{key}` has shape {tuple(value.shape)}, not two dimensions")
        weight = module.weight
        wanted = weight.shape[1] if half == ".lora_A." else weight.shape[0]
        got = value.shape[1] if half == ".lora_A." else value.shape[0]
        if got != wanted:
            raise InputError(
                f"LoRA {file}, made for base `{made_for}`: `{key}` is {got} wide, `{backbone.name}` needs {wanted}"
            )
        peft_state[peft_key] = value
    for key in peft_state:
        other = key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")
        if other not in peft_state:
            raise InputError(f"LoRA {file} has `{key}` but not `{other}`: it is incomplete; fetch it again")
        down, up = (peft_state[key], peft_state[other]) if ".lora_A." in key else (peft_state[other], peft_state[key])
        if down.shape[0] != up.shape[1]:
            raise InputError(f"LoRA {file}: `{key}` and `{other}` have ranks {down.shape[0]} and {up.shape[1]}")
    if not all(math.isfinite(float(value.abs().max())) for value in peft_state.values()):
        raise InputError(f"LoRA {file} holds NaN or infinite values; take an earlier checkpoint")
    return peft_state


def _to_peft(key: str) -> str:
    """From diffusers' names and those of the 2023 attention processors (`processor.to_out_lora.down`)."""
    if ".processor." in key:
        key = key.replace(".processor.", ".").replace("to_out_lora", "to_out.0.lora").replace("_lora.", ".lora.")
    return key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
