"""The shipped model as a stranger's diffusers sees it: nothing of ours is needed to load and run it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPVisionModelWithProjection

import dpt_t2i

BUNDLED = Path(dpt_t2i.__file__).parent / "bundled"


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(BUNDLED / "base", local_files_only=True)


def test_stock_diffusers_loads_and_runs_it(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a red circle", num_inference_steps=2, generator=generator).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 1


def test_every_part_is_float32(pipeline):
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_four_levels_down_and_up(pipeline):
    assert len(pipeline.unet.config.down_block_types) == len(pipeline.unet.config.up_block_types) == 4


def test_different_captions_pool_differently(pipeline):
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    texts = ["a red circle left of a blue square", "a blue square left of a red circle", "a photo of two crosses"]
    ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    pooled = torch.nn.functional.normalize(pipeline.text_encoder(ids).pooler_output, dim=-1)
    off_diagonal = (pooled @ pooled.T)[~torch.eye(3, dtype=torch.bool)]
    assert off_diagonal.max() < 0.999  # word order alone moves it little, as in any CLIP; a wrong EOS gives 1


def test_image_encoder_loads():
    encoder = CLIPVisionModelWithProjection.from_pretrained(BUNDLED / "image_encoder", local_files_only=True)
    assert encoder.dtype == torch.float32
    assert encoder(torch.zeros(1, 3, 64, 64)).image_embeds.shape == (1, 128)


def test_text_and_image_meet_in_one_space(pipeline):
    """Own captions score above hard negatives, flipped sides too, on scenes that trained nothing."""
    from safetensors.torch import load_file

    from dpt_t2i.data.transforms import to_pixels
    from dpt_t2i.scenes.example import make_example
    from dpt_t2i.scenes.render import render

    encoder = CLIPVisionModelWithProjection.from_pretrained(BUNDLED / "image_encoder", local_files_only=True)
    projection = load_file(BUNDLED / "image_encoder" / "text_projection.safetensors")["text_projection.weight"].float()
    examples = [make_example(i, split="val") for i in range(240)]
    texts = [e.caption.text for e in examples] + [e.negative.caption.text for e in examples]
    ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        pixels = torch.stack([to_pixels(render(e.scene)) for e in examples])
        image = torch.nn.functional.normalize(encoder(pixels).image_embeds, dim=-1)
        text = torch.nn.functional.normalize(pipeline.text_encoder(ids).pooler_output @ projection.T, dim=-1)
    own, near = (image * text.unflatten(0, (2, -1))).sum(-1)
    right = (own > near).float()
    assert right.mean() > 0.9
    sides = torch.tensor([e.negative.rule in ("flip_relation", "turn_relation", "swap_objects") for e in examples])
    assert sides.sum() >= 20
    assert right[sides].mean() > 0.85  # chance 0.5, which contrast alone did not leave


def test_weights_stay_under_24_mb_and_are_half_precision():
    from safetensors import safe_open

    files = list(BUNDLED.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 24e6
    for file in files:
        if "lora" in file.name:
            continue
        with safe_open(file, "pt") as opened:
            assert {opened.get_slice(key).get_dtype() for key in opened.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_vae_keeps_a_scene(pipeline):
    from dpt_t2i.data.transforms import to_pixels
    from dpt_t2i.scenes.example import make_example
    from dpt_t2i.scenes.render import render

    pixels = torch.stack([to_pixels(render(make_example(i, split="val").scene)) for i in range(4)])
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    assert (decoded - pixels).abs().mean() < 0.06  # of a range of 2
