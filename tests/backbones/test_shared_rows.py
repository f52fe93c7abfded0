"""Rows that show the same picture: the same numbers as without that knowledge, for less work, nothing left behind."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dpt_t2i.backbones.lora import add_lora
from dpt_t2i.backbones.shared_rows import before_text, shared_rows
from tests.tiny import tiny_backbone

PICTURES = torch.tensor([7, 2, 7, 7, 2])
PATHS = ("conv_in", "down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn1")
TEXTS = ("a red circle", "two blue stars", "a blue square", "", "a star above a circle")


def inputs(backbone):
    """Five rows of two pictures, each under a text of its own."""
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    which = (PICTURES == 2).long()
    return noisy[which], torch.tensor([500, 37])[which], backbone.encode_text(TEXTS)


def rows_seen(backbone, pictures, paths=PATHS, taps="up1"):
    """Rows that each module works on in one pass: hooks lie around `forward`."""
    seen = {}
    modules = {path: backbone.denoiser.get_submodule(path) for path in paths}

    def watched(path, forward):
        def call(first, *args, **kwargs):
            seen[path] = len(first)
            return forward(first, *args, **kwargs)

        return call

    for path, module in modules.items():
        module.forward = watched(path, module.forward)
    backbone.features(*inputs(backbone), backbone.parse_taps(taps), pictures=pictures)
    for module in modules.values():
        del module.forward
    return seen


def test_what_runs_before_the_text_is_read_off_the_denoiser():
    backbone = tiny_backbone()
    assert backbone.text_free == PATHS
    seen = []
    for name, module in backbone.denoiser.named_modules():
        if name in PATHS or name.endswith(".attn2"):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    backbone.predict(*inputs(backbone))
    assert tuple(seen[:3]) == PATHS  # before the first that reads the text
    assert seen[3] == "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, 6),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}, 4),
        ({"addition_embed_type": "text_time"}, 0),
        ({"num_class_embeds": 3}, 0),
    ],
)
def test_other_denoisers(changed, expected):
    read = SimpleNamespace(transformer_blocks=[SimpleNamespace(only_cross_attention=False)])
    blocks = [
        SimpleNamespace(resnets=[1, 2], downsamplers=[1]),
        SimpleNamespace(resnets=[1, 2], attentions=[read], downsamplers=None),
    ]
    assert len(before_text(SimpleNamespace(config=changed, down_blocks=blocks))) == expected


def test_a_first_layer_that_reads_the_text_is_not_shared():
    backbone = tiny_backbone()
    backbone.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].only_cross_attention = True
    assert before_text(backbone.denoiser) == PATHS[:2]


@pytest.mark.parametrize("taps", ["up1", "bottom0_mid", "down_blocks.0.resnets.0", PATHS[2], PATHS[2] + ".to_q"])
def test_maps_and_predictions_are_the_same(taps):
    backbone = tiny_backbone()
    noisy, timesteps, text = inputs(backbone)
    chosen = backbone.parse_taps(taps)
    with torch.no_grad():
        plain, plain_maps = backbone.predict(noisy, timesteps, text, chosen)
        shared, shared_maps = backbone.predict(noisy, timesteps, text, chosen, pictures=PICTURES)
        early = backbone.features(noisy, timesteps, text, chosen, pictures=PICTURES)
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-6)
    for name, value in plain_maps.maps.items():
        torch.testing.assert_close(shared_maps.maps[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(early.maps[name], value, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.denoiser.modules())


def test_each_picture_is_computed_once():
    backbone = tiny_backbone()
    assert rows_seen(backbone, None) == dict.fromkeys(PATHS, 5)
    behind = "down_blocks.1.resnets.0"
    assert rows_seen(backbone, PICTURES, (*PATHS, behind), "mid") == dict.fromkeys(PATHS, 2) | {behind: 5}
    with FlopCounterMode(display=False) as plain:
        backbone.features(*inputs(backbone), backbone.parse_taps("up1"))
    with FlopCounterMode(display=False) as shared:
        backbone.features(*inputs(backbone), backbone.parse_taps("up1"), pictures=PICTURES)
    channels, pixels, time = 8, 64, 32
    convolutions = 2 * 9 * pixels * (4 * channels + 2 * channels**2)  # conv_in, and two of the residual block
    attention = 4 * 2 * pixels * channels**2  # q, k, v, out; the counter does not know the CPU's kernel for the rest
    each = convolutions + 2 * time * channels + attention
    assert plain.get_total_flops() - shared.get_total_flops() == 3 * each  # five rows, two pictures


def test_what_is_read_itself_is_left_as_it_is():
    backbone = tiny_backbone()
    assert rows_seen(backbone, PICTURES, taps=PATHS[2]) == {PATHS[0]: 2, PATHS[1]: 2, PATHS[2]: 5}
    assert rows_seen(backbone, PICTURES, taps="down_blocks.0.resnets.0") == {PATHS[0]: 2, PATHS[1]: 5}


def test_gradients_are_the_same():
    backbone = tiny_backbone()
    parameters = add_lora(backbone, rank=2)
    for number, parameter in enumerate(parameters):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    noisy, timesteps, text = inputs(backbone)

    def gradients(pictures):
        prediction, features = backbone.predict(noisy, timesteps, text, backbone.parse_taps("up1"), pictures=pictures)
        return torch.autograd.grad(prediction.square().sum() + features.maps["up1"].square().sum(), parameters)

    for plain, shared in zip(gradients(None), gradients(PICTURES), strict=True):
        assert (plain - shared).norm() <= 1e-5 * plain.norm()


def test_nothing_is_shared_where_hooks_would_not_be_there_or_not_be_heard():
    backbone = tiny_backbone()
    backbone.denoiser.enable_gradient_checkpointing()
    assert rows_seen(backbone, PICTURES) == dict.fromkeys(PATHS, 5)
    with torch.no_grad():
        assert rows_seen(backbone, PICTURES) == dict.fromkeys(PATHS, 2)
    backbone.denoiser.disable_gradient_checkpointing()
    assert rows_seen(backbone, torch.arange(5)) == dict.fromkeys(PATHS, 5)  # all different
    backbone.denoiser.mid_block.compile()  # only at its first call
    with shared_rows(backbone.denoiser, PATHS, PICTURES):
        assert not any(module._forward_hooks for module in backbone.denoiser.modules())


def test_a_dual_transformer_is_no_error():
    blocks = [SimpleNamespace(resnets=[1], attentions=[SimpleNamespace(transformers=[])], downsamplers=None)]
    config = {"down_block_types": ("CrossAttnDownBlock2D",)}
    assert before_text(SimpleNamespace(config=config, down_blocks=blocks)) == PATHS[:2]


def test_gradients_repeat_on_several_threads():
    """Large maps are summed by all threads; `[index]` would add in whatever order these come."""
    threads, module = torch.get_num_threads(), nn.Linear(64, 64)
    pictures = torch.arange(4).repeat(6)
    rows = torch.randn(24, 256, 64, generator=torch.Generator().manual_seed(3))
    slope = torch.randn(24, 256, 64, generator=torch.Generator().manual_seed(4))

    def gradient():
        module.zero_grad()
        with shared_rows(nn.ModuleDict({"one": module}), ["one"], pictures):
            (module(rows) * slope).sum().backward()
        return module.weight.grad.clone()

    try:
        torch.set_num_threads(2)
        first = gradient()
        assert all(torch.equal(first, gradient()) for _ in range(8))
    finally:
        torch.set_num_threads(threads)
    with shared_rows(nn.ModuleDict({"one": module}), ["one"], pictures):
        assert type(module(rows).grad_fn).__name__ == "IndexSelectBackward0"


def test_hooks_are_gone_after_an_error():
    backbone = tiny_backbone()
    with pytest.raises(RuntimeError, match="stop"), shared_rows(backbone.denoiser, PATHS, PICTURES):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.denoiser.modules())
