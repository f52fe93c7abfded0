"""One tiny, random but seeded pipeline folder a family, of the family's true architecture.

Each builder takes an empty folder and gives it back filled as `pipeline.save_pretrained` does. Classes, block types and
conditioning are those of the published models; only widths and depths are small. Images of 32 x 32 pixels have 8 x 8
latents. Texts are at most `MAX_TOKENS` tokens long for CLIP and `T5_TOKENS` for T5.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.trainers import UnigramTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.tiny import MAX_TOKENS, WORDS, tiny_pipeline, tiny_tokenizer

T5_WIDTH = 32
T5_TOKENS = 40


def save_sd2_v(folder: Path, seed: int = 0) -> Path:
    """Stable Diffusion 2.x 768-v: as SD 1, but predicts v and its attention projects with linear layers."""
    pipeline = tiny_pipeline("v_prediction", seed, use_linear_projection=True)
    return _save(pipeline, folder)


def save_sdxl(folder: Path, seed: int = 0, **options: Any) -> Path:
    """Stable Diffusion XL: three levels, the first without attention; two text encoders; sizes as added conditions.

    Args:
        options: of the pipeline, such as `force_zeros_for_empty_prompt`.
    """
    narrow, wide, projected = 16, 24, 20  # widths of the two encoders, and of the second one's projection
    # Their states are read before the final norm, so the encoders' `spread` is lower than elsewhere.
    time_width = 8
    with _seeded(seed):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 24),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=[1, 1, 2],
            attention_head_dim=[2, 2, 4],
            cross_attention_dim=narrow + wide,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=projected + 6 * time_width,
            norm_num_groups=4,
        )
        parts = {
            "unet": unet,
            "vae": _vae(latent_channels=4, scaling_factor=0.13025, force_upcast=True),
            "text_encoder": CLIPTextModel(_clip_config(narrow, hidden_act="quick_gelu", spread=3.0)),
            "text_encoder_2": CLIPTextModelWithProjection(_clip_config(wide, projection_dim=projected, spread=3.0)),
        }
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    second = tiny_tokenizer()
    second.pad_token = "!"  # as published: the second tokenizer pads with token 0, not with EOS
    pipeline = StableDiffusionXLPipeline(
        **parts, tokenizer=tiny_tokenizer(), tokenizer_2=second, scheduler=scheduler, add_watermarker=False, **options
    )
    return _save(pipeline, folder)


def save_pixart_sigma(folder: Path, seed: int = 0) -> Path:
    """PixArt-Sigma: DiT blocks with cross attention to T5, patches of 2 x 2 latents, a learned variance beside."""
    tokenizer = tiny_t5_tokenizer()
    with _seeded(seed):
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=16,
            caption_channels=T5_WIDTH,
            sample_size=8,
            patch_size=2,
            use_additional_conditions=False,
        )
        parts = {
            "transformer": transformer,
            "vae": _vae(latent_channels=4, scaling_factor=0.13025),
            "text_encoder": _t5(tokenizer),
        }
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return _save(PixArtSigmaPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler), folder)


def save_sd3(folder: Path, seed: int = 0, with_t5: bool = True) -> Path:
    """Stable Diffusion 3.5 medium's shape: joint blocks, dual attention in the first, the last without a text stream.

    Args:
        with_t5: the third encoder is optional; the pipeline then feeds zeros in its place.
    """
    first, second = 12, 16  # together narrower than T5, as published: the pipeline pads
    tokenizer = tiny_t5_tokenizer()
    with _seeded(seed):
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=first + second,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        parts = {
            "transformer": transformer,
            "vae": _vae(
                latent_channels=16,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModelWithProjection(_clip_config(first, projection_dim=first)),
            "text_encoder_2": CLIPTextModelWithProjection(_clip_config(second, projection_dim=second)),
            "text_encoder_3": _t5(tokenizer) if with_t5 else None,
        }
    tokenizers = {
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_tokenizer(),
        "tokenizer_3": tokenizer if with_t5 else None,
    }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _save(StableDiffusion3Pipeline(**parts, **tokenizers, scheduler=scheduler), folder)


def save_flux(folder: Path, seed: int = 0, guidance: bool = True) -> Path:
    """FLUX.1: double stream, then single stream blocks; `dev` with, `schnell` without guidance embedding."""
    tokenizer = tiny_t5_tokenizer()
    with _seeded(seed):
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=24,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
        parts = {
            "transformer": transformer,
            "vae": _vae(
                latent_channels=16,
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModel(_clip_config(24)),
            "text_encoder_2": _t5(tokenizer),
        }
    dev = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256}
    scheduler = FlowMatchEulerDiscreteScheduler(**(dev if guidance else {"shift": 1.0}))
    pipeline = FluxPipeline(**parts, tokenizer=tiny_tokenizer(), tokenizer_2=tokenizer, scheduler=scheduler)
    return _save(pipeline, folder)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd2_v": save_sd2_v,
    "sdxl": save_sdxl,
    "pixart_sigma": save_pixart_sigma,
    "sd3": save_sd3,
    "flux": save_flux,
}


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer trained on `WORDS`, closed by `</s>` and without BOS, as T5's; each word is one piece."""
    special = ["<pad>", "</s>", "<unk>"]
    trained = Tokenizer(Unigram())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    trainer = UnigramTrainer(
        vocab_size=200, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator([" ".join(WORDS)] * 200, trainer)
    learned = {piece: float(score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]}
    vocab = list((learned | {f"▁{word}": -1.0 for word in WORDS}).items())  # the likeliest pieces of all
    return T5Tokenizer(vocab=vocab, extra_ids=0, additional_special_tokens=None, model_max_length=T5_TOKENS)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside the block random numbers are those of `seed`; the global state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _vae(**config: Any) -> AutoencoderKL:
    """Image pixels per latent pixel: 4."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=32,
        **config,
    )


def _clip_config(width: int, projection_dim: int = 8, hidden_act: str = "gelu", spread: float = 10.0) -> CLIPTextConfig:
    tokenizer: CLIPTokenizer = tiny_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection_dim,
        hidden_act=hidden_act,
        initializer_factor=spread,  # texts must differ: at 1.0 random token states are nearly equal
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def _save(pipeline: Any, folder: Path) -> Path:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.save_pretrained(folder)
    return folder
