import pytest
import torch

from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.errors import InputError
from tests.tiny import tiny_backbone, tiny_pipeline


def test_properties():
    backbone = tiny_backbone("v_prediction")
    assert (backbone.latent_channels, backbone.vae_scale, backbone.image_size) == (4, 4, (32, 32))
    assert (backbone.pooled_dim, backbone.text_dim, backbone.num_train_timesteps) == (32, 32, 1000)
    assert (backbone.prediction_type, backbone.dtype, backbone.device.type) == ("v_prediction", torch.float32, "cpu")


def test_everything_is_frozen_and_in_eval_mode():
    pipeline = tiny_pipeline()
    pipeline.unet.train()
    StableDiffusionBackbone(pipeline)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_prediction_is_the_unets_own():
    backbone = tiny_backbone()
    text = backbone.encode_text(["a red circle", "the star"])
    noisy = torch.randn(2, 4, 8, 8)
    timesteps = torch.tensor([900, 10])
    with torch.no_grad():
        prediction, features = backbone.predict(noisy, timesteps, text)
        expected = backbone.pipeline.unet(noisy, timesteps, encoder_hidden_states=text.tokens).sample
    assert torch.equal(prediction, expected)
    assert not features.maps


def test_null_text_is_the_empty_prompt():
    backbone = tiny_backbone()
    null = backbone.null_text(3)
    assert null.tokens.shape == (3, 16, 32)
    assert torch.equal(null.tokens[2], backbone.encode_text([""]).tokens[0])


def test_half_precision_weights_stay_inside():
    backbone = StableDiffusionBackbone(tiny_pipeline().to(torch.bfloat16))
    text = backbone.encode_text(["a red circle"])
    noisy = torch.randn(1, 4, 8, 8, requires_grad=True)
    prediction, features = backbone.predict(noisy, torch.tensor([5]), text, backbone.parse_taps("up1"))
    pixels = backbone.decode_image(backbone.encode_image(torch.zeros(1, 3, 32, 32)))
    outside = (text.tokens, text.pooled, prediction, features.maps["up1"], pixels)
    assert {tensor.dtype for tensor in outside} == {torch.float32}
    features.maps["up1"].sum().backward()
    assert noisy.grad is not None and noisy.grad.abs().max() > 0


def test_an_inner_module_is_a_tap_with_its_own_channels():
    backbone = tiny_backbone()
    tap, block = backbone.parse_taps("up_blocks.1.resnets.0_up1")
    assert (tap.name, tap.channels, tap.stride, block.name) == ("up_blocks.1.resnets.0", 24, 4, "up1")
    with pytest.raises(InputError, match="attn2.to_k` gives no map"):  # one state a word, not a place
        backbone.parse_taps("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    with pytest.raises(InputError, match=r"unknown tap `up_blocks\.7`"):
        backbone.parse_taps("up_blocks.7")


def test_a_slow_tokenizer_is_refused():
    pipeline = tiny_pipeline()
    pipeline.tokenizer.eos_token = None
    with pytest.raises(InputError, match="EOS"):
        StableDiffusionBackbone(pipeline)
