import pytest
import torch
from transformers import T5Config, T5EncoderModel

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


def test_without_a_clip_there_is_no_pooled_text():
    pipeline = tiny_pipeline()
    pipeline.text_encoder = None
    with pytest.raises(InputError, match="base `b` has no text_encoder, so there is no pooled text vector"):
        StableDiffusionBackbone(pipeline, "b")
    pipeline.text_encoder = T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(InputError, match=r"base `b`: text_encoder \(T5EncoderModel\) gives no pooled text vector"):
        StableDiffusionBackbone(pipeline, "b")


def test_a_wrong_path_names_the_nearest_module():
    with pytest.raises(InputError, match=r"did you mean `up_blocks\.1\.attentions\.0`"):
        tiny_backbone().parse_taps("up_blocks.1.attention.0")


@pytest.mark.parametrize("width", [9, 10, 12])
def test_tokens_of_latents_that_the_stride_does_not_divide(width):
    """A U-Net halves and rounds up: 8 x 10 latents have 1 x 2 places where the stride is 8, as maps or as tokens."""
    backbone = tiny_backbone()
    noisy, text = torch.randn(1, 4, 8, width), backbone.encode_text(["a star"])
    taps = backbone.parse_taps("mid_mid_block.attentions.0.transformer_blocks.0")
    maps = backbone.features(noisy, torch.tensor([5]), text, taps).maps
    assert [tuple(map_.shape) for map_ in maps.values()] == [(1, 32, 1, 2)] * 2
