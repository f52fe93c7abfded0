"""Tiny diffusers folders of true architectures, each with a LoRA file that stock diffusers wrote, alpha != rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from tests.families import save_sd2_v, save_sdxl
from tests.tiny import tiny_pipeline

RANK, ALPHA = 4, 7.0
PROMPT = "a red circle"


@dataclass(frozen=True)
class Family:
    """A saved base, its LoRA, and the image that the two give in the pipeline where the LoRA was made."""

    base: Path
    lora: Path  # folder with diffusers' `pytorch_lora_weights.safetensors`
    image: np.ndarray  # [H, W, 3] in [0, 1]
    plain: np.ndarray  # without the LoRA


def save_sd1(folder: Path) -> Path:
    tiny_pipeline().save_pretrained(folder)
    return folder


SAVE: dict[str, Callable[[Path], Path]] = {"sd1": save_sd1, "sd2": save_sd2_v, "sdxl": save_sdxl}


def make(name: str, folder: Path) -> Family:
    """`sd1`, `sd2` or `sdxl`."""
    base = SAVE[name](folder / "base")
    pipeline = stock(base)
    plain = image_of(pipeline)
    put_lora(pipeline.unet)
    save_with_diffusers(pipeline, folder / "lora")
    return Family(base, folder / "lora", image_of(pipeline), plain)


def image_of(pipeline: Any, **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    made = pipeline(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np", **options)
    image: np.ndarray = made.images[0]
    return image


def stock(base: Path) -> Any:
    """The base in stock diffusers, as a user has it."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def put_lora(denoiser: Any) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    denoiser.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    for number, (name, parameter) in enumerate(denoiser.named_parameters()):
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))


def save_with_diffusers(pipeline: Any, folder: Path) -> None:
    described = pipeline.unet.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        unet_lora_adapter_metadata={
            key: sorted(one) if isinstance(one, set) else one for key, one in described.items()
        },
    )
