"""Tiny diffusers folders of true architectures, each with a LoRA file that stock diffusers wrote, alpha != rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny import MAX_TOKENS, tiny_pipeline, tiny_tokenizer

RANK, ALPHA = 4, 7.0
PROMPT = "a red circle"


@dataclass(frozen=True)
class Family:
    """A saved base, its LoRA, and the image that the two give in the pipeline where the LoRA was made."""

    base: Path
    lora: Path  # folder with diffusers' `pytorch_lora_weights.safetensors`
    image: np.ndarray  # [H, W, 3] in [0, 1]
    plain: np.ndarray  # without the LoRA


def make(name: str, folder: Path) -> Family:
    """`sd1`, `sd2` or `sdxl`."""
    pipeline = {"sd1": tiny_pipeline, "sd2": sd2, "sdxl": sdxl}[name]()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "base")
    plain = image_of(pipeline)
    put_lora(pipeline.unet)
    save_with_diffusers(pipeline, folder / "lora")
    return Family(folder / "base", folder / "lora", image_of(pipeline), plain)


def image_of(pipeline: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    made = pipeline(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np")
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


def sd2() -> Any:
    """As SD 1, but v-prediction and linear projections."""
    pipeline = tiny_pipeline("v_prediction")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = {key: value for key, value in pipeline.unet.config.items() if key != "_use_default_values"}
        config["use_linear_projection"] = True
        pipeline.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    return pipeline


def sdxl() -> Any:
    """Three levels, the first without attention; two text encoders; sizes as added conditions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[2, 2, 4],
            cross_attention_dim=16 + 24,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
            norm_num_groups=4,
        )
        parts = {
            "unet": unet.eval(),
            "vae": _vae().eval(),
            "text_encoder": CLIPTextModel(_clip(16)).eval(),
            "text_encoder_2": CLIPTextModelWithProjection(_clip(24)).eval(),
        }
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tokenizers = {"tokenizer": tiny_tokenizer(), "tokenizer_2": tiny_tokenizer()}
    return StableDiffusionXLPipeline(**parts, **tokenizers, scheduler=scheduler, add_watermarker=False)


def save_dit_configs(name: str, folder: Path) -> nn.Module:
    """The config files of a DiT base, all that an export of its LoRA reads; gives back the denoiser."""
    pipelines = {"flux": "FluxPipeline", "pixart": "PixArtSigmaPipeline"}
    transformer: Any = _flux() if name == "flux" else _pixart()
    transformer.save_config(folder / "transformer")
    _vae().save_config(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {"_class_name": pipelines[name], "transformer": ["diffusers", type(transformer).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return transformer


def _flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def _pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
        use_additional_conditions=False,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.13025,
    )


def _clip(width: int) -> CLIPTextConfig:
    tokenizer = tiny_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=20,
        initializer_factor=10.0,  # texts must differ
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
