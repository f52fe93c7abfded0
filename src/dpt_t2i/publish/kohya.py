"""The LoRA file of ComfyUI, A1111 and sd-scripts: kohya's keys with the true alpha, `ss_*` and `modelspec.*` headers.

diffusers' own writer sets every alpha to the rank; this one does not. (It also calls the one text encoder of SD 1 and 2
`lora_te1`, which is `lora_te`; text encoders have no LoRA here.) Header fields: sd-scripts, and ModelSpec 1.0.1
(github.com/Stability-AI/ModelSpec).
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dpt_t2i.backbones.lora_files import LoraFile, kohya_name
from dpt_t2i.errors import InputError
from dpt_t2i.publish.base_model import BaseModel
from dpt_t2i.publish.model_card import setting_of
from dpt_t2i.publish.privacy import public
from dpt_t2i.versions import installed

# ss_* header -> our setting of the run that made the LoRA
SETTINGS = {
    "ss_learning_rate": "train.learning_rate",
    "ss_lr_scheduler": "train.lr_scheduler",
    "ss_lr_warmup_steps": "train.lr_warmup_steps",
    "ss_max_train_steps": "train.max_train_steps",
    "ss_batch_size_per_device": "train.train_batch_size",
    "ss_gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "ss_max_grad_norm": "train.max_grad_norm",
    "ss_mixed_precision": "train.mixed_precision",
    "ss_min_snr_gamma": "denoise.snr_gamma",
    "ss_caption_dropout_rate": "denoise.caption_dropout",
    "ss_seed": "seed",
}
DYNAMIC = "Dynamic"  # sd-scripts' word for ranks and alphas that differ between layers


def kohya_tensors(lora: LoraFile, base: BaseModel) -> dict[str, Tensor]:
    """`lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`, a scalar, for every layer.

    Raises:
        InputError: a DiT family, for which these keys do not exist.
    """
    refuse_dit(base)
    tensors: dict[str, Tensor] = {}
    for name, layer in lora.layers.items():
        stem = kohya_name(*name.split(".", 1))
        tensors[f"{stem}.lora_down.weight"] = layer.down.contiguous()
        tensors[f"{stem}.lora_up.weight"] = layer.up.contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def refuse_dit(base: BaseModel) -> None:
    """Raises `InputError` for a family without kohya keys."""
    if base.denoiser_key != "unet":
        raise InputError(
            f"format kohya is for U-Nets (SD 1, 2, XL): kohya's keys of DiT models fuse q, k and v, which neither "
            f"diffusers' writer nor this one does for {base.pipeline_class}; use --format diffusers, whose "
            f"`transformer.` keys ComfyUI reads"
        )


def kohya_header(
    lora: LoraFile, base: BaseModel, tensors: Mapping[str, Tensor], title: str, license_: str | None, usage_hint: str
) -> dict[str, str]:
    """Text entries of the file's header; what is not known is left out, and no path is in it."""
    digest = content_hash(tensors)
    generation, is_v2 = _generation(base)
    v_prediction = base.prediction_type == "v_prediction"
    architecture, base_version = {
        "xl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
        "2": ("stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512", "sd_v2"),
        "1": ("stable-diffusion-v1", "sd_v1"),
    }[generation]
    config = lora.ours.get("config", {})
    height, width = _resolution(config, base)
    header: dict[str, Any] = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",  # whose module names the keys hold
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": "v" if v_prediction else base.prediction_type,
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modelspec.license": license_,
        "modelspec.usage_hint": usage_hint,
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one_or_dynamic({layer.rank for layer in lora.layers.values()}),
        "ss_network_alpha": _one_or_dynamic({layer.alpha for layer in lora.layers.values()}),
        "ss_base_model_version": f"{base_version}_v" if v_prediction and generation != "xl" else base_version,
        "ss_v2": is_v2,
        "ss_sd_model_name": public(base.name),
        "ss_output_name": title,
        "ss_resolution": f"({width}, {height})",
        "ss_training_comment": f"dpt-t2i {installed('dpt-t2i') or 'unknown'}",
    }
    header |= {key: public(setting_of(config, path)) for key, path in SETTINGS.items()}
    return {key: str(value) for key, value in header.items() if value is not None}


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the file's bytes behind its header, which the header itself may therefore name."""
    content = save(dict(tensors))
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _generation(base: BaseModel) -> tuple[str, bool]:
    """(`1`, `2` or `xl`, is it 2), from the U-Net's own config: XL alone is told its sizes, 2 projects linearly."""
    if base.config.get("addition_embed_type") == "text_time":
        return "xl", False
    is_v2 = bool(base.config.get("use_linear_projection"))
    return ("2" if is_v2 else "1"), is_v2


def _resolution(config: Mapping[str, Any], base: BaseModel) -> tuple[int, int]:
    side = setting_of(config, "data.resolution")
    return (side, side) if isinstance(side, int) else base.image_size


def _one_or_dynamic(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else DYNAMIC
