"""Stable Diffusion 2.x 768-v: the class of SD 1, another config."""

from pathlib import Path

import pytest
import torch

from dpt_t2i.backbones.loading import load_backbone
from tests.families import save_sd2_v


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_sd2_v(tmp_path_factory.mktemp("sd2") / "sd2-v")


def test_it_predicts_v_and_says_so(folder):
    backbone = load_backbone(folder, device="cpu")
    assert backbone.prediction_type == "v_prediction"
    assert backbone.fingerprint()["architecture"]["use_linear_projection"] is True
    clean, noise, timesteps = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0), torch.tensor([400])
    alpha = backbone.pipeline.scheduler.alphas_cumprod[400]
    by_hand = alpha.sqrt() * 3.0 - (1 - alpha).sqrt() * 1.0  # v = sqrt(a) noise - sqrt(1 - a) z_0
    torch.testing.assert_close(backbone.target(clean, noise, timesteps), by_hand.expand(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("path", "channels", "stride"),
    [
        ("up_blocks.1.attentions.0", 24, 4),
        ("up_blocks.1.attentions.1.transformer_blocks.0", 24, 4),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2", 8, 1),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", 32, 8),
    ],
)
def test_an_inner_attention_block_is_a_tap_by_its_path(folder, path, channels, stride):
    backbone = load_backbone(folder, device="cpu")
    (tap,) = backbone.parse_taps(path)
    assert (tap.channels, tap.stride) == (channels, stride)
    noisy = torch.randn(2, 4, 16, 32)
    with torch.no_grad():
        features = backbone.features(noisy, torch.tensor([5, 900]), backbone.encode_text(["a star", "two"]), [tap])
    assert features.maps[path].shape == (2, channels, 16 // stride, 32 // stride)


def test_tokens_of_an_attention_block_lie_as_its_map_does(folder):
    """The last projection of a transformer adds its input, a map: what it adds is the map of the tokens before it."""
    backbone = load_backbone(folder, device="cpu")
    outer = "up_blocks.1.attentions.0"
    taps = backbone.parse_taps(f"up_blocks.1.resnets.0_{outer}_{outer}.transformer_blocks.0")
    with torch.no_grad():
        text = backbone.encode_text(["a star"])
        maps = backbone.features(torch.randn(1, 4, 16, 32), torch.tensor([5]), text, taps).maps
        before, after, tokens = maps.values()
        linear = backbone.denoiser.get_submodule(outer).proj_out
        added = linear(tokens.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(after, before + added, rtol=1e-4, atol=1e-5)
