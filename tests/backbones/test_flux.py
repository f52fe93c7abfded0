"""FLUX: packing, texts, guidance and prediction as the stock pipeline's, taps, LoRA, sizes."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch import nn

from dpt_t2i.backbones.fingerprint import lora_hash
from dpt_t2i.backbones.flux import TRAINING_GUIDANCE, pack, position_ids, unpack
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import add_lora, load_lora
from dpt_t2i.backbones.types import GUIDANCE, TextStates
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.self_correction import SelfCorrection
from tests.backbones import contract
from tests.families import save_flux
from tests.tiny import tiny_adapter

PROMPTS = ["a red circle", "the star left of a square"]


@pytest.fixture(scope="module")
def dev(tmp_path_factory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux") / "schnell", guidance=False)


def test_packing_is_the_pipelines():
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    # The second token is the patch at rows 0..1, columns 2..3; its first four channels are those of channel 0.
    assert tokens[0, 1, :4].tolist() == [2.0, 3.0, 8.0, 9.0]
    assert torch.equal(unpack(tokens, 2, 3), latents)
    assert torch.equal(position_ids(2, 3), FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32))


def test_widths_are_those_of_the_config(dev):
    backbone = load_backbone(dev, device="cpu")
    assert (backbone.latent_channels, backbone.vae_scale, backbone.image_size) == (16, 4, (32, 32))
    assert (backbone.pooled_dim, backbone.text_dim, backbone.num_train_timesteps) == (24, 32, 1000)
    assert [(tap.name, tap.channels, tap.stride) for tap in backbone.taps.values()] == [
        (name, 32, 2) for name in ("double0", "double1", "single0", "single1")
    ]


def test_texts_are_the_pipelines(dev):
    backbone = load_backbone(dev, device="cpu")
    ours = backbone.encode_text(PROMPTS)
    with torch.no_grad():
        tokens, pooled, _ = backbone.pipeline.encode_prompt(PROMPTS, device="cpu")
    torch.testing.assert_close(ours.tokens, tokens)
    torch.testing.assert_close(ours.pooled, pooled)
    assert ours.tokens.shape == (2, 512, 32)
    assert ours.mask.sum(dim=1).tolist() == [4, 7]  # T5 closes a text with EOS, and opens it with nothing
    assert ours.extras[GUIDANCE].tolist() == [TRAINING_GUIDANCE] * 2


def with_guidance(text: TextStates, scale: float) -> TextStates:
    extras = {**text.extras, GUIDANCE: torch.full((len(text),), scale)}
    return TextStates(text.tokens, text.pooled, text.mask, extras)


def test_prediction_is_the_transformers_own_at_every_guidance(dev):
    backbone = load_backbone(dev, device="cpu")
    noisy, timesteps = torch.randn(2, 16, 8, 4), torch.tensor([900.5, 10.0])
    text = with_guidance(backbone.encode_text(PROMPTS), 5.0)
    with torch.no_grad():
        prediction, _ = backbone.predict(noisy, timesteps, text)
        expected = backbone.pipeline.transformer(
            FluxPipeline._pack_latents(noisy, 2, 16, 8, 4),
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            timestep=timesteps / 1000,
            guidance=torch.tensor([5.0, 5.0]),
            txt_ids=torch.zeros(512, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 2, "cpu", torch.float32),
        ).sample
        other, _ = backbone.predict(noisy, timesteps, with_guidance(text, 1.0))
    expected = FluxPipeline._unpack_latents(expected, 8 * 4, 4 * 4, 4)
    torch.testing.assert_close(prediction, expected)
    assert not torch.allclose(other, prediction, atol=1e-4)


def test_schnell_takes_no_guidance(schnell):
    backbone = load_backbone(schnell, device="cpu")
    noisy, timesteps = torch.randn(1, 16, 4, 4), torch.tensor([500])
    text = backbone.encode_text(PROMPTS[:1])
    with torch.no_grad():
        one, other = (backbone.predict(noisy, timesteps, with_guidance(text, scale))[0] for scale in (1.0, 5.0))
    assert torch.equal(one, other)


def test_inner_modules_are_taps_of_the_image_alone(dev):
    backbone = load_backbone(dev, device="cpu")
    tap, block = backbone.parse_taps("transformer_blocks.1.attn_single0")
    assert (tap.channels, tap.stride, tap.select, block.name) == (32, 2, "first", "single0")
    with pytest.raises(InputError, match="gives no map of the image"):
        backbone.parse_taps("single_transformer_blocks.0.attn")  # text and image in one sequence


def test_half_a_patch_is_named(dev):
    backbone = load_backbone(dev, device="cpu")
    with pytest.raises(InputError, match="image of 32 x 20 pixels: both sides must be multiples of 8"):
        backbone.features(
            torch.zeros(1, 16, 5, 8), torch.tensor([500]), backbone.null_text(1), backbone.parse_taps("double0")
        )


def test_lora_sits_where_it_can_learn(dev):
    backbone = load_backbone(dev, device="cpu")
    parameters = add_lora(backbone, rank=2)
    # Double blocks: 4 projections of the image, 4 of the text; single blocks: q, k, v of both together.
    assert len(parameters) == 2 * (2 * 8 + 2 * 3)
    for number, parameter in enumerate(parameters):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    prediction, _ = backbone.predict(*contract.inputs(backbone))
    prediction.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)


@pytest.mark.parametrize("tap, count", [("double0", 6), ("double1", 14), ("single0", 19)])
def test_lora_up_to_a_tap_leaves_out_what_the_tap_never_sees(dev, tap, count):
    # The text's queries and its output in the last block read: nothing of the image depends on them.
    backbone = load_backbone(dev, device="cpu")
    taps = backbone.parse_taps(tap)
    parameters = contract.trained_lora(backbone, scope="to_tap", taps=taps)
    assert len(parameters) == 2 * count
    _, *gradients = contract.gradients(backbone, taps[0], parameters)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_stock_diffusers_reads_the_lora_file(dev, tmp_path):
    contract.stock_diffusers_reads_the_lora_file(dev, tmp_path)


def test_a_lora_on_the_last_projection_alone_is_on_no_other(dev, tmp_path):
    """PEFT takes a list of names for endings, and every single block ends in `proj_out` too."""
    backbone = load_backbone(dev, device="cpu")
    width, out = backbone.denoiser.proj_out.in_features, backbone.denoiser.proj_out.out_features
    tensors = {
        "transformer.proj_out.lora_A.weight": torch.ones(2, width),
        "transformer.proj_out.lora_B.weight": torch.ones(out, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    hashes = []
    for _ in range(2):
        load_lora(backbone, tmp_path / "x.safetensors")
        found = {name.partition(".lora_")[0] for name, _ in backbone.denoiser.named_parameters() if ".lora_" in name}
        assert found == {"proj_out"}
        hashes.append(lora_hash(backbone.denoiser))
    assert hashes[0] == hashes[1]


def test_a_correction_is_told_the_size_of_the_picture(dev):
    pipeline = load_backbone(dev, device="cpu").pipeline
    correction = SelfCorrection(pipeline, tiny_adapter(load_backbone(dev, device="cpu"), "single0"), correct=0.1)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    for height, width in ((48, 32), (64, 16)):  # other tokens, and as many in another shape
        with pytest.raises(InputError, match="draws another size than the 32 x 32 pixels"), correction.hooked("a star"):
            pipeline("a star", height=height, width=width, **call)
        with correction.hooked("a star", height=height, width=width) as hook:
            pipeline("a star", height=height, width=width, **call)
        assert len(hook.scores) == 2
    with pytest.raises(InputError, match="give it the `height` and `width` of the call"):
        pipeline("a star", height=48, width=32, callback_on_step_end=correction.callback("a star"), **call)
