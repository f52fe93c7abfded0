"""Stable Diffusion 3: texts and prediction as the stock pipeline's, taps, LoRA, sizes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import add_lora
from dpt_t2i.errors import InputError
from tests.backbones import contract
from tests.families import save_sd3

PROMPTS = ["a red circle", "the star left of a square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "sd3")


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3") / "no-t5", with_t5=False)


def test_widths_are_those_of_the_config(folder):
    backbone = load_backbone(folder, device="cpu")
    assert (backbone.latent_channels, backbone.vae_scale, backbone.image_size) == (16, 4, (32, 32))
    assert (backbone.pooled_dim, backbone.text_dim, backbone.num_train_timesteps) == (28, 32, 1000)
    assert backbone.prediction_type == "flow_prediction"
    assert [(tap.name, tap.channels, tap.stride) for tap in backbone.taps.values()] == [
        ("block0", 16, 2), ("block1", 16, 2), ("block2", 16, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("t5", [True, False])
def test_texts_are_the_pipelines(t5, folder, without_t5):
    backbone = load_backbone(folder if t5 else without_t5, device="cpu")
    ours = backbone.encode_text(PROMPTS)
    with torch.no_grad():
        tokens, _, pooled, _ = backbone.pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, device="cpu"
        )
    torch.testing.assert_close(ours.tokens, tokens)
    torch.testing.assert_close(ours.pooled, pooled)
    assert torch.equal(ours.extras["pooled_projections"], pooled)
    assert ours.tokens.shape == (2, 16 + 256, 32)
    assert ours.tokens[:, :16, 28:].abs().max() == 0  # the CLIPs are narrower than T5: padded
    assert (ours.tokens[:, 16:].abs().max() > 0) == t5
    assert ours.mask.sum(dim=1).tolist() == [5, 8]  # BOS, the words, EOS; T5's copies of the words do not count


def test_a_wrong_eos_in_the_config_does_not_make_all_texts_one(folder):
    backbone = load_backbone(folder, device="cpu")
    backbone.pipeline.text_encoder.eos_token_id = backbone.pipeline.text_encoder.text_model.eos_token_id = 49407
    wrong = backbone.encode_text(PROMPTS)
    assert torch.equal(wrong.extras["pooled_projections"][0, :12], wrong.extras["pooled_projections"][1, :12])
    assert not torch.allclose(wrong.pooled[0, :12], wrong.pooled[1, :12], atol=1e-3)


def test_prediction_is_the_transformers_own(folder):
    backbone = load_backbone(folder, device="cpu")
    text = backbone.encode_text(PROMPTS)
    noisy, timesteps = torch.randn(2, 16, 8, 4), torch.tensor([900.5, 10.0])
    with torch.no_grad():
        prediction, features = backbone.predict(noisy, timesteps, text)
        expected = backbone.pipeline.transformer(
            noisy, encoder_hidden_states=text.tokens, pooled_projections=text.pooled, timestep=timesteps
        ).sample
    torch.testing.assert_close(prediction, expected)
    assert not features.maps


def test_inner_modules_are_taps_of_the_image_alone(folder):
    backbone = load_backbone(folder, device="cpu")
    tap, block = backbone.parse_taps("transformer_blocks.0.attn2_block1")
    assert (tap.channels, tap.stride, block.name) == (16, 2, "block1")
    with pytest.raises(InputError, match="gives no map of the image"):
        backbone.parse_taps("time_text_embed.text_embedder")
    with pytest.raises(InputError, match="unknown tap `up1`; .*known: block0, block1, block2"):
        backbone.parse_taps("up1")


def test_sizes_that_do_not_fit_are_named(folder):
    backbone = load_backbone(folder, device="cpu")
    text, timesteps = backbone.encode_text(PROMPTS[:1]), torch.tensor([500])
    with pytest.raises(InputError, match="image of 32 x 20 pixels: both sides must be multiples of 8"):
        backbone.predict(torch.zeros(1, 16, 5, 8), timesteps, text)
    with pytest.raises(InputError, match="at most 12 patches a side: images of 96 pixels, not 104"):
        backbone.predict(torch.zeros(1, 16, 8, 26), timesteps, text)


def test_lora_sits_where_it_can_learn(folder):
    backbone = load_backbone(folder, device="cpu")
    parameters = add_lora(backbone, rank=2)
    names = {name.split(".lora_")[0] for name, _ in backbone.denoiser.named_parameters() if ".lora_" in name}
    # Joint attention: 4 of the image and 4 of the text; dual attention in block 0: 4 more. In the last block the text
    # stream ends: it has no `to_add_out`, and nobody reads what `add_q_proj` asks.
    assert len(names) == 3 * 8 + 4 - 2
    assert "transformer_blocks.1.attn.to_add_out" in names and "transformer_blocks.2.attn.add_k_proj" in names
    assert "transformer_blocks.2.attn.add_q_proj" not in names
    for number, parameter in enumerate(parameters):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    prediction, _ = backbone.predict(*contract.inputs(backbone))
    prediction.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)


def test_stock_diffusers_reads_the_lora_file(folder, tmp_path):
    contract.stock_diffusers_reads_the_lora_file(folder, tmp_path)


def test_a_base_without_a_clip_has_no_pooled_vector(folder, tmp_path):

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    del index["text_encoder_2"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="no text_encoder_2: without both CLIPs there is no pooled text vector"):
        load_backbone(copy, device="cpu")
