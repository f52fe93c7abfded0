"""LoRA on the denoiser's attention projections, through PEFT, in the file format that every diffusers user knows.

The header of a file says what it is: `lora_adapter_metadata` (diffusers' own entry; without it alpha is lost) and `dpt`
(our resolved config, the base's fingerprint, versions).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from dpt_t2i.backbones import peft_only
from dpt_t2i.backbones.fingerprint import check_fingerprint
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora_files import (
    DIFFUSERS_HEADER_KEY,
    HEADER_KEY,
    LoraLayer,
    layers_of,
    our_header,
    read_header,
    read_lora,
)
from dpt_t2i.backbones.lora_linear import as_one_function
from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError
from dpt_t2i.files import in_one_move
from dpt_t2i.versions import told

# Of every attention, self and cross, as in the release; those of the text stream in an MMDiT, as diffusers' scripts.
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT_STREAM = ("add_q_proj", "to_add_out")  # what the texts ask and are told: lost where the text stream ends
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_NAME = "dpt"


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
    return _inject(backbone, config)


def lora_parameters(backbone: Backbone) -> list[nn.Parameter]:
    """The parameters of the denoiser's LoRA, in the module order; empty without one."""
    return [parameter for name, parameter in backbone.denoiser.named_parameters() if ".lora_" in name]


def lora_sizes(backbone: Backbone) -> list[tuple[int, float]]:
    """Each (rank, alpha) that some layer of the LoRA has; one pair in a LoRA of ours."""
    layers = [module for module in backbone.denoiser.modules() if isinstance(module, BaseTunerLayer)]
    return sorted({(one.r[name], float(one.lora_alpha[name])) for one in layers for name in one.r})


def lora_scopes(backbone: Backbone, taps: Sequence[Tap]) -> list[Literal["all", "to_tap"]]:
    """The `scope`s of `add_lora` that give the layers of this LoRA: both where the tap is the deepest, none of a LoRA
    of other layers."""
    layers = {name for name, module in backbone.denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
    found: list[Literal["all", "to_tap"]] = ["all"] if layers == set(_projections(backbone)) else []
    return found + (["to_tap"] if layers and layers == set(_projections_up_to(backbone, taps)) else [])


def remove_lora(backbone: Backbone) -> None:
    """Back to the plain base; nothing happens without a LoRA."""
    if not lora_parameters(backbone):
        return
    if peft_only.has_lora_methods(backbone.denoiser):
        denoiser: Any = backbone.denoiser
        denoiser.unload_lora()  # the pipeline's own way would take a text encoder's LoRA off too
    else:
        peft_only.remove(backbone.denoiser)


def lora_is_disabled(backbone: Backbone) -> bool:
    """Whether there is a LoRA, and all of it is switched off."""
    layers = [module for module in backbone.denoiser.modules() if isinstance(module, BaseTunerLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)


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


@torch.no_grad()
def lora_change(backbone: Backbone) -> float:
    """Norm of what the LoRA adds to the weights it sits on, over the norm of these weights: 0 = it does nothing."""
    added = own = 0.0
    for module in backbone.denoiser.modules():
        if isinstance(module, BaseTunerLayer) and ADAPTER_NAME in module.lora_A:
            added += float(module.get_delta_weight(ADAPTER_NAME).float().square().sum())
            own += float(module.get_base_layer().weight.float().square().sum())
    return math.sqrt(added / own) if own else 0.0


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
        "versions": told("dpt-t2i", "diffusers", "peft", "torch", "transformers"),
    }
    header = {
        "format": "pt",
        DIFFUSERS_HEADER_KEY: json.dumps(described, default=sorted, sort_keys=True),  # PEFT's targets are a set
        HEADER_KEY: json.dumps(ours, sort_keys=True),
    }
    path = folder / LORA_FILE
    with in_one_move(path) as unfinished:
        save_file({key: value.contiguous() for key, value in tensors.items()}, unfinished, metadata=header)
    return path


def read_lora_header(path: Path) -> dict[str, Any]:
    """Our part of the header (`config`, `base`, `versions`) of a LoRA file or its folder; {} in a foreign file.

    Raises:
        InputError: file missing or truncated.
    """
    file = lora_file(path)
    return our_header(read_header(file), file)


def lora_file(path: Path) -> Path:
    """The weight file of a LoRA given by file or folder. Raises `InputError` where there is none."""
    file = path / LORA_FILE if path.is_dir() else path
    if file.is_file():
        return file
    others = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    is_adapter, has_adapter = (path / "config.json").is_file(), (path / "adapter").is_dir()
    if is_adapter or (has_adapter and not others):
        raise InputError(f"{path} holds an adapter and no LoRA; give it as --adapter, with --lora none")
    if len(others) == 1:
        return others[0]  # one that another tool named, or `dpt export --format kohya` beside its adapter
    mend = f"give a {LORA_FILE} or the folder that holds it"
    if others:
        mend = f"name one of its {len(others)} .safetensors files"
    raise InputError(f"LoRA {file} does not exist; {mend}")


def load_lora(backbone: Backbone, path: Path, trainable: bool = False) -> dict[str, Any]:
    """Put the LoRA of a file or folder on the denoiser, in place of any that is there.

    Every naming of `lora_files` is read. Values are float32, exactly as stored.

    Returns:
        Our part of the header, {} for a foreign file.

    Raises:
        InputError: missing or truncated file, keys, shapes or ranks that the denoiser does not know, another
            architecture. Other weights of the same architecture are a warning that names both.
    """
    file = lora_file(Path(path))
    ours = read_lora_header(file)
    if "base" in ours:
        check_fingerprint(ours["base"], backbone.fingerprint(), f"LoRA {file}")
    read = read_lora(
        file,
        {backbone.denoiser_key: backbone.denoiser},
        backbone.name,
        diffusers_reader(backbone.pipeline, backbone.denoiser),
    )
    _place(backbone, read.layers, trainable)
    return ours


def place_lora(backbone: Backbone, tensors: Mapping[str, Tensor], what: str, trainable: bool = False) -> None:
    """`load_lora` for tensors that are in no LoRA file; `what` names them in messages. Without alphas the scale is 1.

    Raises:
        InputError: keys, shapes or ranks that the denoiser does not know.
    """
    parts = {backbone.denoiser_key: backbone.denoiser}
    layers = layers_of(
        tensors, parts, what, backbone.name, convert=diffusers_reader(backbone.pipeline, backbone.denoiser)
    )
    _place(backbone, layers, trainable)


def _place(backbone: Backbone, layers: Mapping[str, LoraLayer], trainable: bool) -> None:
    """`layers` by `unet.<module>`, in place of whatever LoRA is there."""
    own = {name.removeprefix(f"{backbone.denoiser_key}."): layer for name, layer in layers.items()}
    remove_lora(backbone)
    config = _config_of(own)
    # A list would be taken for endings too: FLUX's `proj_out` for that of every single block.
    config.target_modules = "|".join(map(re.escape, own))
    parameters = _inject(backbone, config)
    state = {f"{name}.lora_A.weight": layer.down for name, layer in own.items()}
    state |= {f"{name}.lora_B.weight": layer.up for name, layer in own.items()}
    set_peft_model_state_dict(backbone.denoiser, state, adapter_name=ADAPTER_NAME)
    for parameter in parameters:
        parameter.requires_grad_(trainable)


def lora_metadata(layers: Mapping[str, LoraLayer], denoiser_key: str) -> dict[str, Any]:
    """diffusers' header entry that lets ranks and alphas survive; `layers` by module of the denoiser."""
    return {f"{denoiser_key}.{key}": value for key, value in _config_of(layers).to_dict().items()}


def _config_of(layers: Mapping[str, LoraLayer]) -> LoraConfig:
    """PEFT's description of layers that may differ in rank and alpha: the commonest values, and who differs."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(layers),
        rank_pattern={f"^{name}": value for name, value in ranks.items() if value != rank},
        alpha_pattern={f"^{name}": value for name, value in alphas.items() if value != alpha},
    )


# Of old attention processors diffusers names an alpha after the half: `...processor.to_q_lora.down.weight.alpha`.
_ALPHA_END = re.compile(r"(?:_lora\.down\.weight)?\.alpha$")


def diffusers_reader(pipeline: Any, denoiser: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """diffusers' own reading of foreign names (kohya's and others' for DiT families), None where a family has none.

    Args:
        pipeline: a diffusers pipeline or its class.
        denoiser: its U-Net or transformer, whose config tells a U-Net's numbered blocks.
    """
    read = getattr(pipeline, "lora_state_dict", None)
    if read is None:
        return None
    how = {"unet_config": denoiser.config} if hasattr(denoiser, "down_blocks") else {}

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        answer = read(tensors, **how)
        state, alphas = answer if isinstance(answer, tuple) else (answer, None)
        named = {f"{_ALPHA_END.sub('', key)}.alpha": torch.as_tensor(value) for key, value in (alphas or {}).items()}
        return {**state, **named}

    return convert


def _inject(backbone: Backbone, config: LoraConfig) -> list[nn.Parameter]:
    """Fresh layers as `config` says; their parameters, float32 whatever the base's dtype."""
    denoiser: Any = backbone.denoiser
    as_one_function(config, denoiser)
    if peft_only.has_lora_methods(denoiser):
        denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
    else:
        inject_adapter_in_model(config, denoiser, ADAPTER_NAME)
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


def _file_key(backbone: Backbone, peft_key: str) -> str:
    if backbone.denoiser_key == "unet":
        peft_key = peft_key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
    return f"{backbone.denoiser_key}.{peft_key}"
