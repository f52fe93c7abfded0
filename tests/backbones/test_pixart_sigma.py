"""PixArt-Sigma behind the door: the stock pipeline's own numbers, and what only it has."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline
from safetensors.torch import load_file, save_file

from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import load_lora, lora_disabled, lora_parameters, save_lora
from dpt_t2i.backbones.pixart_sigma import PixArtSigmaBackbone
from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.loop import sample
from dpt_t2i.sampling.noise import initial_noise
from tests.backbones import contract
from tests.families import save_pixart_sigma

PROMPTS = ["a red circle", "two blue stars above the green square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_pixart_sigma(tmp_path_factory.mktemp("pixart") / "sigma")


@pytest.fixture
def backbone(folder):
    return load_backbone(folder, device="cpu")


def test_widths_and_taps_are_those_of_the_config(backbone):
    assert (backbone.latent_channels, backbone.vae_scale, backbone.image_size) == (4, 4, (32, 32))
    assert (backbone.text_dim, backbone.pooled_dim) == (32, 32)
    table = {name: (tap.module, tap.channels, tap.stride) for name, tap in backbone.taps.items()}
    assert table == {f"block{i}": (f"transformer_blocks.{i}", 16, 2) for i in range(3)}


def test_texts_are_what_the_pipeline_feeds_and_pooled_is_the_mean_of_the_real_ones(backbone):
    prompts = ["a RED circle", "a star"]
    tokens, mask, negative, negative_mask = backbone.pipeline.encode_prompt(
        prompts, device="cpu", max_sequence_length=40
    )
    ours, null = backbone.encode_text(prompts), backbone.null_text(2)
    torch.testing.assert_close(ours.tokens, tokens)
    assert torch.equal(ours.mask, mask.bool())
    torch.testing.assert_close(null.tokens, negative)
    assert torch.equal(null.mask, negative_mask.bool())
    assert ours.mask.sum(dim=1).tolist() == [4, 3]  # three words and EOS; two and EOS
    torch.testing.assert_close(ours.pooled[0], tokens[0, :4].sum(dim=0) / 4)


def test_an_uppercase_letter_keeps_its_place(backbone):
    prompt = "a RED circle"
    assert [prompt[start:end] for start, end in backbone.token_offsets([prompt])[0][:4]] == ["a", "RED", "circle", ""]
    assert backbone.token_offsets(["\u0130 star"])[0] == backbone.token_offsets(["I star"])[0]  # lower() is two long


def test_features_are_the_blocks_tokens_by_rows(backbone):
    noisy, timesteps, text = contract.inputs(backbone)
    caught = []
    handle = backbone.denoiser.get_submodule("transformer_blocks.1").register_forward_hook(
        lambda *args: caught.append(args[-1])
    )
    with torch.no_grad():
        features = backbone.features(noisy, timesteps, text, backbone.parse_taps("block1"))
    handle.remove()
    rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    assert torch.equal(features.maps["block1"][1, :, 1, 2], caught[0][1, columns + 2])
    assert features.maps["block1"].shape == (2, 16, rows, columns)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_uncorrected_images_are_those_of_the_stock_pipeline(backbone, guidance_scale):
    noise = torch.stack([initial_noise(seed, (4, 8, 16)) for seed in (0, 1)])
    settings = SampleConfig(steps=4, guidance_scale=guidance_scale, scheduler="ddim")
    text, null = backbone.encode_text(PROMPTS), backbone.null_text(2)
    ours = sample(backbone, text, null, noise, settings, CorrectionConfig())
    pipeline = backbone.pipeline
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    theirs = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=guidance_scale, latents=noise, output_type="latent", height=32,
        width=64, use_resolution_binning=False, clean_caption=False, max_sequence_length=40,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_learned_variance_is_left_out(backbone):
    noisy, timesteps, text = contract.inputs(backbone)
    with torch.no_grad():
        raw = backbone.denoiser(
            noisy, text.tokens, timesteps, encoder_attention_mask=text.mask, added_cond_kwargs={}
        ).sample
        prediction, _ = backbone.predict(noisy, timesteps, text)
    assert raw.shape[1] == 8
    assert torch.equal(prediction, raw[:, :4])


def test_padding_is_not_looked_at(backbone):
    noisy, timesteps, text = contract.inputs(backbone)
    noise = torch.randn_like(text.tokens) * ~text.mask[..., None]
    from dataclasses import replace

    with torch.no_grad():
        one, _ = backbone.predict(noisy, timesteps, text)
        other, _ = backbone.predict(noisy, timesteps, replace(text, tokens=text.tokens + noise))
    torch.testing.assert_close(one, other)


def test_latents_that_the_patches_do_not_divide_are_one_clear_error(backbone):
    text = backbone.encode_text(["a star"])
    with pytest.raises(InputError, match="image of 32 x 28 pixels: both sides must be multiples of 8"):
        backbone.features(torch.zeros(1, 4, 7, 8), torch.tensor([5]), text, backbone.parse_taps("block0"))


def test_lora_keys_are_the_transformers_and_foreign_files_are_read(backbone, tmp_path):
    contract.trained_lora(backbone, rank=2)
    file = save_lora(backbone, tmp_path, {})
    state = load_file(file)
    assert len(state) == 2 * 3 * 2 * 4  # A and B; 3 blocks; self and cross attention; q, k, v, out
    assert all(key.startswith("transformer.transformer_blocks.") for key in state)
    noisy, timesteps, text = contract.inputs(backbone)
    with torch.no_grad():
        tuned, _ = backbone.predict(noisy, timesteps, text)
        with lora_disabled(backbone):
            plain, _ = backbone.predict(noisy, timesteps, text)
    assert not torch.allclose(tuned, plain, atol=1e-4)
    peft_named = {key.replace("transformer.", "base_model.model.", 1): value for key, value in state.items()}
    save_file(peft_named, tmp_path / "adapter_model.safetensors")  # what PEFT's own save_pretrained names them
    assert load_lora(backbone, tmp_path / "adapter_model.safetensors") == {}
    assert not any(parameter.requires_grad for parameter in lora_parameters(backbone))
    with torch.no_grad():
        assert torch.equal(backbone.predict(noisy, timesteps, text)[0], tuned)


def test_ranks_may_differ_between_modules_of_a_foreign_file(backbone, tmp_path):
    names = [f"transformer_blocks.{i}.attn1.to_q" for i in range(2)]
    state = {}
    for name, rank in zip(names, (2, 3), strict=True):
        state |= {f"transformer.{name}.lora_A.weight": torch.randn(rank, 16)}
        state |= {f"transformer.{name}.lora_B.weight": torch.randn(16, rank)}
    save_file(state, tmp_path / "foreign.safetensors")
    load_lora(backbone, tmp_path / "foreign.safetensors")
    states = torch.randn(1, 5, 16)
    for name in names:
        layer = backbone.denoiser.get_submodule(name)
        down, up = (state[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(layer(states), layer.base_layer(states) + states @ down.T @ up.T)


def test_a_lora_of_another_family_is_one_clear_error(backbone, tmp_path):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight"
    save_file({key: torch.zeros(2, 16)}, tmp_path / "unet.safetensors")
    with pytest.raises(InputError, match="is unknown to `sigma`"):
        load_lora(backbone, tmp_path / "unet.safetensors")


def test_alpha_is_told_apart_by_its_size_conditions(folder):
    pipeline = PixArtSigmaPipeline.from_pretrained(folder)
    pipeline.transformer.use_additional_conditions = True
    with pytest.raises(InputError, match="PixArt-Alpha, not Sigma"):
        PixArtSigmaBackbone(pipeline, "b")


def test_a_missing_tokenizer_file_is_named(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        load_backbone(copy, device="cpu")
