"""What base a LoRA or an adapter was made for, and whether it fits the one at hand."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpt_t2i.errors import InputError

logger = logging.getLogger(__name__)

HALF = "float16"
LATENT_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_LORA_KEY = re.compile(r"(\.lora_\w+)\.([^.]+)")  # of PEFT: `to_q.lora_A.NAME.weight`
COMPILED = "_orig_mod."  # what `torch.compile` puts before the names of a module


def weights_hash(module: nn.Module) -> str:
    """16 hex digits of the weights of `module` under its LoRA, if any.

    Values are rounded to bfloat16 first, so that the same checkpoint has one hash, loaded in float32 or bfloat16. In
    float16 it has another, unless it is stored so.
    """
    state = {key.replace(COMPILED, ""): value for key, value in module.state_dict().items()}
    plain = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    return _hash(plain, torch.bfloat16)


def lora_hash(module: nn.Module) -> str | None:
    """16 hex digits of the LoRA on `module`, exact; None without one. What a single one is called there is not told."""
    state = {key.replace(COMPILED, ""): value for key, value in module.state_dict().items() if ".lora_" in key}
    if len({match[2] for match in map(_LORA_KEY.search, state) if match}) == 1:
        state = {_LORA_KEY.sub(r"\1.dpt", key): value for key, value in state.items()}
    return _hash(state, torch.float32) if state else None


def tensors_hash(state: Mapping[str, Tensor]) -> str:
    """16 hex digits of named tensors, exact in float32."""
    return _hash(state, torch.float32)


def part_hashes(pipeline: Any) -> dict[str, str]:
    """Component name -> hash of the weights that decide an image beside the denoiser's: VAE and text encoders."""
    return {
        name: weights_hash(part)
        for name, part in sorted(pipeline.components.items())
        if isinstance(part, nn.Module) and name.startswith(("vae", "text_encoder"))
    }


def config_hash(pipeline: Any) -> str:
    """16 hex digits of what decides an image beside weights: the schedule, and how latents are scaled."""
    schedule = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    vae = {key: pipeline.vae.config.get(key) for key in LATENT_SCALES}
    told = json.dumps([type(pipeline.scheduler).__name__, schedule, vae], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def check_fingerprint(made_for: Mapping[str, Any], actual: Mapping[str, Any], what: str) -> None:
    """Compare two `Backbone.fingerprint()`s; `what` names the artifact in the message.

    Another architecture cannot work; other weights of the same one (a fine-tune) can, less well: a warning that names
    the parts that differ. `parts` and `lora` are compared where both sides have them: old artifacts do not, and a
    `lora` of None says that there was none.

    Raises:
        InputError: the architectures differ; names both bases and the first differing entry. Or `made_for` is no
            fingerprint.
    """
    if not isinstance(made_for.get("architecture"), Mapping):
        raise InputError(f"{what} does not say which base it was made for; export it again")
    theirs, ours = _plain(made_for["architecture"]), _plain(actual["architecture"])
    names = made_for.get("name"), actual.get("name")
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            raise InputError(
                f"{what} was made for base `{names[0]}` ({key} {theirs.get(key)}), "
                f"not for `{names[1]}` ({key} {ours.get(key)}); load that base or give an artifact of this one"
            )
    differing = _differing_parts(made_for, actual)
    if differing and HALF in (made_for.get("dtype"), actual.get("dtype")):
        logger.info(
            "%s was made for base `%s`; whether `%s` has the same weights is not known: float16 rounds them otherwise "
            "than float32 and bfloat16 do",
            what, *names,
        )  # fmt: skip
    elif differing:
        logger.warning(
            "%s was made for base `%s` (%s); `%s` has the same architecture but other weights (%s)",
            what, names[0], _list(differing, 0), names[1], _list(differing, 1),
        )  # fmt: skip
    if "lora" in made_for and "lora" in actual and made_for["lora"] != actual["lora"]:
        logger.warning(
            "%s was trained with %s on base `%s`; `%s` has %s: scores may suffer",
            what, _lora_name(made_for["lora"]), names[0], names[1], _lora_name(actual["lora"]),
        )  # fmt: skip


def _differing_parts(made_for: Mapping[str, Any], actual: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Part -> its two hashes, where both sides know them and they differ."""
    theirs, ours = (
        {**({"denoiser": one["weights"]} if "weights" in one else {}), **one.get("parts", {})}
        for one in (made_for, actual)
    )
    return {part: (theirs[part], ours[part]) for part in theirs if part in ours and theirs[part] != ours[part]}


def _list(differing: Mapping[str, tuple[str, str]], side: int) -> str:
    return ", ".join(f"{part} {hashes[side]}" for part, hashes in differing.items())


def _lora_name(digest: str | None) -> str:
    return "no LoRA" if digest is None else f"LoRA {digest}"


def _plain(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """As the file has it: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(architecture)))
    return plain


def _hash(state: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
