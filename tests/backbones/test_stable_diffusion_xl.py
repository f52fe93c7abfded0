"""Stable Diffusion XL behind the door: the stock pipeline's own numbers, and what only XL has."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import load_lora, remove_lora, save_lora
from dpt_t2i.backbones.stable_diffusion_xl import StableDiffusionXLBackbone
from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.loop import sample
from dpt_t2i.sampling.noise import initial_noise
from tests.backbones import contract
from tests.families import save_sdxl

PROMPTS = ["a red circle", "two blue stars above the green square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("xl") / "xl")


@pytest.fixture
def backbone(folder):
    return load_backbone(folder, device="cpu")


def test_widths_and_taps_are_those_of_the_config(backbone):
    assert (backbone.latent_channels, backbone.vae_scale, backbone.image_size) == (4, 4, (32, 32))
    assert (backbone.text_dim, backbone.pooled_dim) == (16 + 24, 20)
    table = {name: (tap.channels, tap.stride) for name, tap in backbone.taps.items()}
    assert table == {
        "bottom0": (8, 2), "bottom1": (16, 4), "bottom2": (24, 4), "mid": (24, 4),
        "up0": (24, 2), "up1": (16, 1), "up2": (8, 1),
    }  # fmt: skip


def test_texts_are_what_the_pipeline_feeds(backbone):
    tokens, negative, pooled, negative_pooled = backbone.pipeline.encode_prompt(PROMPTS, device="cpu")
    ours, null = backbone.encode_text(PROMPTS), backbone.null_text(2)
    assert torch.equal(ours.tokens, tokens)
    torch.testing.assert_close(ours.pooled, pooled)
    assert torch.equal(ours.extras["text_embeds"], pooled)
    assert torch.equal(null.tokens, negative) and not negative.any()
    assert torch.equal(null.extras["text_embeds"], negative_pooled)


def test_without_the_zeros_the_null_text_is_the_encoded_empty_prompt(tmp_path):
    backbone = load_backbone(save_sdxl(tmp_path, force_zeros_for_empty_prompt=False), device="cpu")
    tokens, _, pooled, _ = backbone.pipeline.encode_prompt([""], device="cpu")
    null = backbone.null_text(1)
    torch.testing.assert_close(null.tokens, tokens)
    torch.testing.assert_close(null.pooled, pooled)


def test_pooling_does_not_trust_the_text_config(backbone):
    expected = backbone.encode_text(PROMPTS).pooled
    encoder = backbone.pipeline.text_encoder_2
    for part in (encoder, *encoder.modules()):
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = 0
    assert torch.equal(backbone.encode_text(PROMPTS).pooled, expected)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_uncorrected_images_are_those_of_the_stock_pipeline(backbone, name):
    """Both guidance branches get their own pooled vector and the sizes of the image, here no square."""
    import diffusers

    scheduler = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}[name]
    noise = torch.stack([initial_noise(seed, (4, 8, 16)) for seed in (0, 1)])
    settings = SampleConfig(steps=4, guidance_scale=5.0, scheduler=name)
    text, null = backbone.encode_text(PROMPTS), backbone.null_text(2)
    ours = sample(backbone, text, null, noise, settings, CorrectionConfig())
    pipeline = backbone.pipeline
    latent = {"clip_sample": False} if name == "ddim" else {}  # z_0 is no pixel: ours never clips it
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **latent)
    theirs = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=5.0, latents=noise, output_type="latent", height=32, width=64
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_pipeline_itself_reads_the_lora_file(backbone, folder, tmp_path):
    contract.trained_lora(backbone, rank=2, alpha=3.0)
    save_lora(backbone, tmp_path, {})
    stock = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    plain = contract.stock_latents(stock)
    stock.load_lora_weights(tmp_path)
    tuned = contract.stock_latents(stock)
    assert not torch.allclose(plain, tuned, atol=1e-3)
    torch.testing.assert_close(tuned, contract.stock_latents(backbone.pipeline), rtol=1e-5, atol=1e-5)


def test_half_precision_upcasts_the_vae_and_gives_it_back(folder):
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    exact = load_backbone(folder, device="cpu")
    backbone = load_backbone(folder, device="cpu", dtype="float16")
    seen = []
    vae = backbone.pipeline.vae
    vae.encoder.register_forward_hook(lambda *_: seen.append(vae.dtype))
    with torch.no_grad():
        latents = backbone.encode_image(pixels)
        decoded = backbone.decode_image(latents)
        torch.testing.assert_close(latents, exact.encode_image(pixels), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(decoded, exact.decode_image(latents), rtol=1e-2, atol=5e-3)
    assert seen == [torch.float32]  # its config says force_upcast
    assert vae.dtype == backbone.dtype == torch.float16
    # The pipeline upcasts what it finds in float16, and nothing else.
    images = backbone.pipeline("a red circle", num_inference_steps=1, output_type="pt").images
    assert images.isfinite().all()
    vae.register_to_config(force_upcast=False)
    with torch.no_grad():
        backbone.encode_image(pixels)
    assert seen[-1] == torch.float16


def test_a_second_encoder_without_projection_is_one_clear_error(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.text_encoder_2 = CLIPTextModel(pipeline.text_encoder_2.config)
    with pytest.raises(InputError, match="base `b`: text_encoder_2 .CLIPTextModel. gives no pooled vector"):
        StableDiffusionXLBackbone(pipeline, "b")


def test_other_size_conditions_are_one_clear_error(folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.unet.register_to_config(projection_class_embeddings_input_dim=20 + 5 * 8)  # the refiner takes five
    with pytest.raises(InputError, match="base `b`.*no refiner"):
        StableDiffusionXLBackbone(pipeline, "b")


def test_a_missing_file_of_the_second_encoder_is_named(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="text_encoder_2 holds no weights"):
        load_backbone(copy, device="cpu")
    shutil.copy(folder / "text_encoder_2" / "model.safetensors", copy / "text_encoder_2")
    (copy / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer_2/vocab.json is missing"):
        load_backbone(copy, device="cpu")


def test_a_fine_tune_that_normalises_its_latents_is_followed(folder, tmp_path):
    """As Playground 2.5: per-channel mean and deviation in the VAE's config, undone as the pipeline undoes them."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "vae" / "config.json").read_text())
    config |= {"latents_mean": [-1.0, 0.5, 0.0, 2.0], "latents_std": [8.0, 4.0, 2.0, 1.0], "scaling_factor": 0.5}
    (copy / "vae" / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(copy, device="cpu")
    vae = backbone.pipeline.vae
    with torch.no_grad():
        latents = torch.randn(1, 4, 8, 8)
        theirs = vae.decode(latents * torch.tensor([16.0, 8, 4, 2])[:, None, None] + torch.tensor(
            [-1.0, 0.5, 0, 2])[:, None, None]).sample  # fmt: skip
        torch.testing.assert_close(backbone.decode_image(latents), theirs)
        pixels = torch.rand(1, 3, 32, 32)
        raw = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(backbone.encode_image(pixels)[:, 0], (raw[:, 0] + 1.0) / 16.0)


def test_kohyas_files_are_read_with_their_alpha_and_their_own_numbering_of_blocks(backbone, tmp_path):
    numbered = {  # two ResNets a level: blocks of the whole U-Net in a row, as the original code counts them
        "input_blocks_4_1": "down_blocks.1.attentions.0",
        "middle_block_1": "mid_block.attentions.0",
        "output_blocks_1_1": "up_blocks.0.attentions.1",
    }
    state, places = {}, {}
    for seed, (theirs, ours) in enumerate(numbered.items()):
        layer = backbone.denoiser.get_submodule(f"{ours}.transformer_blocks.0.attn1.to_q")
        generator = torch.Generator().manual_seed(seed)
        down, up = (
            torch.randn(shape, generator=generator) for shape in ((2, layer.in_features), (layer.out_features, 2))
        )
        name = f"lora_unet_{theirs}_transformer_blocks_0_attn1_to_q"
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
        places[f"{ours}.transformer_blocks.0.attn1.to_q"] = (down, up)
    save_file(state, tmp_path / "kohya.safetensors")
    load_lora(backbone, tmp_path / "kohya.safetensors")
    for place, (down, up) in places.items():
        layer = backbone.denoiser.get_submodule(place)
        states = torch.randn(1, 3, layer.in_features)
        by_hand = layer.base_layer(states) + 3.0 / 2 * states @ down.T @ up.T
        torch.testing.assert_close(layer(states), by_hand, rtol=1e-4, atol=1e-4)


def test_kohyas_convolutions_are_read_where_stock_diffusers_reads_them(backbone, tmp_path):
    """LoCon's: in the original numbering, whose ResNets diffusers finds by the U-Net's own config."""
    layer = backbone.denoiser.down_blocks[0].resnets[0].conv1
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, layer.in_channels, 3, 3, generator=generator)
    up = torch.randn(layer.out_channels, 2, 1, 1, generator=generator)
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "locon.safetensors")
    load_lora(backbone, tmp_path / "locon.safetensors")
    found = backbone.denoiser.down_blocks[0].resnets[0].conv1
    assert torch.equal(found.lora_A["dpt"].weight, down) and torch.equal(found.lora_B["dpt"].weight, up)
    assert found.scaling["dpt"] == 0.5


def test_a_lora_of_attention_and_convolutions_in_the_original_names_is_read_as_stock_reads_it(backbone, tmp_path):
    """diffusers then names the attention's alphas after their halves."""
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    modules = {
        "middle_block_1_transformer_blocks_0_attn1_to_q": f"{attention}.to_q",
        "middle_block_1_transformer_blocks_0_attn1_to_out_0": f"{attention}.to_out.0",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "time_embed_0": "time_embedding.linear_1",
    }
    generator, tensors = torch.Generator().manual_seed(0), {}
    for stem, name in modules.items():
        wide = backbone.denoiser.get_submodule(name).weight.shape
        shapes = {"down": (4, *wide[1:]), "up": (wide[0], 4, *[1] * (len(wide) - 2))}
        tensors |= {
            f"lora_unet_{stem}.lora_{half}.weight": torch.randn(shape, generator=generator) / 4
            for half, shape in shapes.items()
        }
        tensors[f"lora_unet_{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "locon.safetensors")
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    text, at = backbone.encode_text(PROMPTS[:1]), torch.tensor([500])

    def predicted():
        with torch.no_grad():
            return backbone.predict(noisy, at, text)[0]

    plain = predicted()
    load_lora(backbone, tmp_path / "locon.safetensors")
    ours = predicted()
    remove_lora(backbone)
    backbone.pipeline.load_lora_weights(tmp_path / "locon.safetensors")
    torch.testing.assert_close(ours, predicted(), rtol=0, atol=1e-6)
    assert float((ours - plain).abs().max()) > 1e-2
