"""What holds the text encoder while its token states learn to say more."""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel


@pytest.fixture
def tell(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools/bundled")  # its scripts import each other by name
    return importlib.import_module("tell")


def test_what_moved_is_told_against_the_spread_of_before(tell):
    before = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[2.0, 1.0], [0.0, 1.0]]])  # variance 1 and 0
    change = torch.tensor([[[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 0.0]]])
    assert tell.moved(change, before).item() == pytest.approx((4 + 1) / 4)


def test_keys_and_values_of_the_denoiser_measure_a_change(tell):
    """|x R|^2 is the sum over all cross-attention layers of |K x|^2 + |V x|^2."""
    reading = tell._reading()
    state = torch.randn(reading.shape[0], generator=torch.Generator().manual_seed(0))
    unet = tell.UNet2DConditionModel.from_pretrained(tell.TARGET / "base/unet")
    want = sum(
        layer.weight.float().mv(state).square().sum()
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
        for attention in getattr(block, "attentions", [])
        for layer in (attention.transformer_blocks[0].attn2.to_k, attention.transformer_blocks[0].attn2.to_v)
    )
    torch.testing.assert_close((state @ reading).square().sum(), want, rtol=1e-4, atol=0)


def test_a_larger_readout_names_no_louder(tell):
    """Only the states can make a name certain: the rows that read them have length one."""
    config = CLIPTextConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = tell.Telling(CLIPTextModel(config))
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.names.bias.zero_()
        found = model.name(states)
        model.names.weight.mul_(7)
        torch.testing.assert_close(model.name(states), found)
        torch.testing.assert_close(model.name(2 * states), 2 * found)
