"""A random but seeded Stable Diffusion pipeline, four U-Net levels deep, built in memory in well under a second.

Latents are [4, 8, 8], images 32 x 32 pixels, texts at most 16 tokens. Nothing is learned: it is for shapes, gradients,
identities and round trips.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.config import AdapterConfig

WORDS = (
    "a",
    "and",
    "of",
    "the",
    "green",
    "red",
    "blue",
    "circle",
    "square",
    "star",
    "left",
    "right",
    "two",
    "above",
    "below",
)
MAX_TOKENS = 16


def tiny_tokenizer() -> CLIPTokenizer:
    """Byte-level CLIP BPE in which most of `WORDS` are one token, and every other word is spelt in letters."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(pieces)):
            pair = ("".join(pieces[:end]), pieces[end])
            if pair not in merges:
                merges.append(pair)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tiny_pipeline(
    prediction_type: str = "epsilon", seed: int = 0, use_linear_projection: bool = False
) -> StableDiffusionPipeline:
    """A whole pipeline with random weights of `seed`; the global random state is left as it was."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 24, 32),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=32,
            use_linear_projection=use_linear_projection,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                initializer_factor=10.0,  # texts must differ: at 1.0 random token states are nearly equal
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_backbone(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionBackbone:
    """The pipeline above behind the package's own door."""
    return StableDiffusionBackbone(tiny_pipeline(prediction_type, seed), name=f"tiny-{seed}")


def tiny_adapter(backbone: StableDiffusionBackbone, taps: str = "up1", seed: int = 0) -> DiscriminativeAdapter:
    """A random adapter that fits `backbone`, in eval mode."""
    config = AdapterConfig(
        hidden_dim=16, num_heads=2, dim_feedforward=32, num_queries_matching=3, num_queries_rec=5, contrastive_dim=8
    )
    channels = {tap.name: tap.channels for tap in backbone.parse_taps(taps)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiscriminativeAdapter(config, channels, backbone.pooled_dim, backbone.text_dim).eval()


def read_apart(texts: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Whether the tiny encoder, which reads few tokens, can tell each two apart."""
    batches = [tiny_tokenizer()(list(some), truncation=True)["input_ids"] for some in (texts, others)]
    return [one != other for one, other in zip(*batches, strict=True)]
