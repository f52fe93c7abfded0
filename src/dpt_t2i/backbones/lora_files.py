"""A LoRA file, in whatever naming it came, as plain layers: a module, its two matrices, its alpha.

For the module `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0` of a U-Net the namings in use are

    unet.<module>.lora.down.weight                  diffusers
    unet.<module>.lora_A.weight                     PEFT under diffusers' prefix, also DiT families (`transformer.`)
    base_model.model.<module>.lora_A.weight         PEFT's own file
    unet.....attn1.processor.to_out_lora.down.weight   attention processors of 2023, the released DPT checkpoint
    lora_unet_<module with _>.lora_down.weight      kohya, with `.alpha`
    lora_unet_input_blocks_1_1_....lora_down.weight kohya for SDXL: the original code's block names

A file is read by a table of all these names of the modules that are there, so no name is ever guessed from a key.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dpt_t2i.errors import InputError

HEADER_KEY = "dpt"  # our entry of the header: config, base, versions
DIFFUSERS_HEADER_KEY = "lora_adapter_metadata"
TEXT_ENCODER_PREFIXES = ("text_encoder", "lora_te")
KOHYA_PREFIXES = {"unet": "lora_unet"}  # DiT families have other names there, which diffusers reads

_KEY = re.compile(
    r"(?P<owner>.+?)"
    r"(?:\.lora_(?P<letter>[AB])(?:\.\w+)?\.weight"  # PEFT, with or without the adapter's name
    r"|[._]lora(?:_linear_layer)?[._](?P<half>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NO_LORA = (".diff", ".diff_b", ".lora_mid.weight", ".w_norm", ".b_norm", ".lora_A.bias", ".lora_B.bias")
NO_LORA_PARTS = ("hada_w", "hada_t", "lokr_", "bundle_emb", "oft_blocks", "oft_diag")
_NO_PLAIN_LORA = "no plain LoRA; DoRA, LoHa, LoKr, changed weights and biases are not read"
DORA = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_PROCESSOR_LEAF = re.compile(r"(.+)\.(to_q|to_k|to_v|to_out)(\.0)?")
_ATTENTION = re.compile(r"(down|up|mid)_blocks?(?:\.(\d+))?\.attentions\.(\d+)\.(.+)")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LoraLayer:
    """The change of one module's weight: `alpha / rank * up @ down`."""

    down: Tensor  # [r, in], of a convolution [r, in, kh, kw]; float32
    up: Tensor  # [out, r], of a convolution [out, r, 1, 1]; float32
    alpha: float  # the true one, in no relation to the rank

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """What a file holds, checked against the modules that it is for."""

    path: Path
    layers: Mapping[str, LoraLayer]  # `unet.<module>` -> its layer, in the modules' order
    ours: Mapping[str, Any]  # our part of the header (`config`, `base`, `versions`), {} in a foreign file


def read_header(file: Path) -> dict[str, str]:
    """The text entries of a safetensors file. Raises `InputError`: missing, truncated, or a pickle."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"LoRA {file} is truncated or no safetensors file ({error}); {_mend(file)}") from error


def our_header(header: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Our entry of a header, {} where there is none. Raises `InputError` where it is no JSON object."""
    return _json_entry(header, HEADER_KEY, file)


def read_lora(
    file: Path,
    parts: Mapping[str, nn.Module],
    base_name: str,
    convert: Callable[[dict[str, Tensor]], Tensors] | None = None,
) -> LoraFile:
    """Read a LoRA for the modules of `parts` (`unet` -> the denoiser; their weights may be on the meta device).

    Args:
        base_name: what messages call the model that `parts` belong to.
        convert: asked once for other names where some key is unknown: diffusers knows more formats than we do.

    Raises:
        InputError: truncated file; a key that is no LoRA's or of no module here; shapes or ranks that do not fit; a
            half missing; NaN.
    """
    header = read_header(file)
    ours = our_header(header, file)
    what = f"LoRA {file}, made for base `{ours.get('base', {}).get('name', 'unknown')}`"
    described = _json_entry(header, DIFFUSERS_HEADER_KEY, file) or _pefts_description(file, parts)
    return LoraFile(file, layers_of(read_tensors(file), parts, what, base_name, described, convert), ours)


def layers_of(
    tensors: Tensors,
    parts: Mapping[str, nn.Module],
    what: str,
    base_name: str,
    described: Mapping[str, Any] | None = None,
    convert: Callable[[dict[str, Tensor]], Tensors] | None = None,
) -> dict[str, LoraLayer]:
    """The layers of `tensors` by `part.module`, in the modules' order; see `read_lora`.

    Args:
        what: names the LoRA in messages.
        described: diffusers' entry of the header; without it, and without alphas among the tensors, alpha is the rank.

    Raises:
        InputError: see `read_lora`.
    """
    names = _names_of(parts)
    for key in tensors:
        if key.endswith(DORA):  # diffusers' converters would drop its magnitudes
            raise InputError(f"{what}: `{key}` is of a DoRA, which scales weights too; give a plain LoRA")
        if key.endswith(NO_LORA) or any(part in key for part in NO_LORA_PARTS):  # converters would drop some of them
            raise InputError(f"{what}: key `{key}` is of {_NO_PLAIN_LORA}")
        if key.startswith(TEXT_ENCODER_PREFIXES):  # before a converter may leave it out
            raise InputError(
                f"{what}: key `{key}` changes a text encoder, which stays frozen here; "
                "give a LoRA of the denoiser alone"
            )
    if convert is not None and any(_owner(key) not in names for key in tensors):
        tensors = _converted(tensors, convert, what, base_name)
    found = _by_module(tensors, names, what, base_name)
    if not found:
        raise InputError(f"{what}: it holds no LoRA layer")
    layers = {}
    for part, root in parts.items():
        own = f"{part}."
        settings = {key.removeprefix(own): value for key, value in (described or {}).items() if key.startswith(own)}
        for module_name, module in root.named_modules():
            if (name := own + module_name) in found:
                layers[name] = _layer(found[name], module, name, module_name, settings, what, base_name)
    return layers


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `InputError`: missing, truncated, or a pickle."""
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"LoRA {file} is truncated or no safetensors file ({error}); {_mend(file)}") from error


def kohya_name(part: str, module: str) -> str:
    """kohya's stem of a U-Net's module: `lora_unet_mid_block_attentions_0_...`."""
    return f"{KOHYA_PREFIXES[part]}_{module.replace('.', '_')}"


def _names_of(parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every name under which a file may speak of a module -> `part.module`."""
    names: dict[str, str] = {}
    for part, root in parts.items():
        modules = dict(root.named_modules())
        # each level of a U-Net has its resnets and one more place: the downsampler, or one more resnet on the way up
        places = 1 + sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+", name)) for name in modules)
        for name, module in modules.items():
            if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim > 1:
                names |= dict.fromkeys(_aliases(part, name, places), f"{part}.{name}")
    return names


def _aliases(part: str, module: str, places: int) -> Iterator[str]:
    yield f"{part}.{module}"
    if part in ("unet", "transformer"):
        yield f"base_model.model.{module}"
    if leaf := _PROCESSOR_LEAF.fullmatch(module):
        yield f"{part}.{leaf[1]}.processor.{leaf[2]}"
    if part in KOHYA_PREFIXES:
        yield kohya_name(part, module)
        if original := _original_name(module, places):
            yield kohya_name(part, original)


def _original_name(module: str, places: int) -> str | None:
    """The original Stable Diffusion code's name of a module inside an attention block.

    Its `input_blocks` are numbered through: 0 is the first convolution, then for each level its blocks and one
    downsampler; `output_blocks` have as many a level, their upsampler inside the last.
    """
    if (found := _ATTENTION.fullmatch(module)) is None:
        return None
    side, level, index, rest = found.groups()
    if side == "mid":
        return f"middle_block.1.{rest}"
    number = int(level) * places + int(index)
    return f"input_blocks.{number + 1}.1.{rest}" if side == "down" else f"output_blocks.{number}.1.{rest}"


def _owner(key: str) -> str | None:
    found = _KEY.fullmatch(key)
    return None if found is None else found["owner"]


def _by_module(tensors: Tensors, names: Mapping[str, str], what: str, base_name: str) -> dict[str, dict[str, Tensor]]:
    """`part.module` -> its `down`, `up`, `alpha`, whichever the file has."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{what}: key `{key}` is of {_NO_PLAIN_LORA}")
        if match["owner"] not in names:
            raise InputError(
                f"{what}: key `{key}` is unknown to `{base_name}`; is it a LoRA of this family, or "
                "of another base (--pretrained_model_name_or_path, --base)?"
            )
        half = match["half"] or match["alpha"] or {"A": "down", "B": "up"}[match["letter"]]
        own = found.setdefault(names[match["owner"]], {})
        if half in own:
            raise InputError(
                f"{what}: key `{key}` is a second {half} of `{names[match['owner']]}`; give a file with one LoRA in it"
            )
        own[half] = value
    return found


def _converted(tensors: Tensors, convert: Callable[[dict[str, Tensor]], Tensors], what: str, base_name: str) -> Tensors:
    """What `convert` makes of foreign names; fused projections come back as several layers, so never as fewer."""
    try:
        converted = convert(dict(tensors))
    except Exception as error:  # diffusers' converters raise whatever their string surgery happens to meet
        reason = textwrap.shorten(str(error), 160)
        raise InputError(f"{what}: its keys are unknown to `{base_name}` ({reason})") from error
    given, taken = _halves(tensors), _halves(converted)
    if taken < given:
        raise InputError(
            f"{what}: diffusers understands only {taken} of its {given} matrices for `{base_name}`, as where a file "
            "mixes two ways of naming; save it again in one"
        )
    return converted


def _halves(tensors: Tensors) -> int:
    return sum(value.ndim > 1 for value in tensors.values())


def _pefts_description(file: Path, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """PEFT writes alpha and the like into `adapter_config.json` beside its file: the same as diffusers' entry.

    Raises:
        InputError: it is no JSON object, or describes a DoRA.
    """
    beside = file.with_name(PEFT_CONFIG)
    if file.name != PEFT_FILE or not beside.is_file():
        return {}
    try:
        told = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{beside} is no JSON ({error}); fetch it again") from error
    if not isinstance(told, dict):
        raise InputError(f"{beside} is no JSON object; fetch it again")
    if told.get("use_dora"):
        raise InputError(f"{beside} describes a DoRA, which scales weights too; give a plain LoRA")
    return {f"{part}.{key}": value for part in parts for key, value in told.items()}


def _layer(
    given: Mapping[str, Tensor],
    module: nn.Module,
    name: str,
    module_name: str,
    settings: Mapping[str, Any],
    what: str,
    base_name: str,
) -> LoraLayer:
    for half in ("down", "up"):
        if half not in given:
            raise InputError(f"{what}, is incomplete: `{name}` has no {half} half; fetch it again")
    down, up, weight = given["down"].float(), given["up"].float(), module.weight
    assert isinstance(weight, Tensor)
    for half, got, wanted in (("down", down.shape[1:], weight.shape[1:]), ("up", up.shape[:1], weight.shape[:1])):
        if got != wanted or given[half].ndim != weight.ndim:
            sizes = "x".join(map(str, got)), "x".join(map(str, wanted))
            raise InputError(f"{what}: `{name}` {half} is {sizes[0]} wide, `{base_name}` needs {sizes[1]}")
    rank = down.shape[0]
    told = _pattern(settings, "rank_pattern", module_name, settings.get("r", rank))
    if rank == 0 or up.shape[1] != rank:
        raise InputError(f"{what}: the halves of `{name}` have ranks {rank} and {up.shape[1]}; fetch it again")
    if told != rank:
        raise InputError(f"{what}: `{name}` has rank {rank}, its header says {told}; fetch it again")
    alpha = _alpha(given, module_name, settings, rank)
    if not all(map(math.isfinite, (alpha, *(float(half.abs().max()) for half in (down, up))))):
        raise InputError(f"{what}, holds NaN or infinite values in `{name}`; take an earlier checkpoint")
    return LoraLayer(down, up, alpha)


def _alpha(given: Mapping[str, Tensor], module_name: str, settings: Mapping[str, Any], rank: int) -> float:
    """The file's own, else its header's, else the rank, as every reader takes it."""
    if "alpha" in given:
        return float(given["alpha"])
    alpha = float(_pattern(settings, "alpha_pattern", module_name, settings.get("lora_alpha", rank)))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha  # its scale is alpha / sqrt(rank)


def _pattern(settings: Mapping[str, Any], kind: str, module_name: str, otherwise: Any) -> Any:
    """The value of the first pattern that ends the module's name, as PEFT reads its patterns."""
    for pattern, value in (settings.get(kind) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module_name):
            return value
    return otherwise


def _json_entry(header: Mapping[str, str], key: str, file: Path) -> dict[str, Any]:
    try:
        entry = json.loads(header.get(key, "{}"))
    except ValueError as error:
        raise InputError(f"LoRA {file}: its header entry `{key}` is no JSON ({error}); {_mend(file)}") from error
    if not isinstance(entry, dict):
        raise InputError(f"LoRA {file}: its header entry `{key}` is no JSON object; fetch it again")
    return entry


def _mend(file: Path) -> str:
    released = "the release's checkpoint? `dpt import-official` makes LoRA and adapter of it"
    return released if file.suffix in (".bin", ".pt", ".pth", ".ckpt") else "fetch it again"
