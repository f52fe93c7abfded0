"""Rows that are only read end at the tap: the same numbers as by two passes, for less work, nothing left behind."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dpt_t2i.backbones.first_rows import behind_taps
from dpt_t2i.backbones.lora import add_lora
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from tests.tiny import tiny_backbone, tiny_pipeline

PICTURES = torch.tensor([0, 1, 0, 0, 1])
TEXTS = ("a red circle", "two blue stars", "a blue square", "", "a star above a circle")
KINDS = [None, ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")]
UP = {"DownBlock2D": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
TAPS = """up1 up_blocks.1.attentions.1 bottom0_mid down_blocks.0.resnets.0 mid up0_up2 up3 bottom0 bottom3
up1_up_blocks.1.attentions.1 up_blocks.1.attentions.1_up_blocks.1.upsamplers.0""".split()


def backbone_of(kinds=None):
    """The tiny one, or one whose first level does not read the text, as the bundled model's."""
    if kinds is None:
        return tiny_backbone()
    pipeline = tiny_pipeline()
    config = dict(pipeline.unet.config) | {"down_block_types": kinds, "up_block_types": UP[kinds[0]]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel.from_config(config).eval()
    return StableDiffusionBackbone(pipeline, "text-free start")


def inputs(backbone, sides=(8, 12)):
    """Five rows of two pictures, each under a text of its own."""
    noisy = torch.randn(2, 4, *sides, generator=torch.Generator().manual_seed(1))
    return noisy[PICTURES], torch.tensor([500, 37])[PICTURES], backbone.encode_text(TEXTS)


def by_two_passes(backbone, taps, first):
    noisy, timesteps, text = inputs(backbone)
    rows = torch.arange(5)
    prediction, own = backbone.predict(noisy[:first], timesteps[:first], text.select(rows[:first]), taps)
    others = backbone.features(noisy[first:], timesteps[first:], text.select(rows[first:]), taps)
    return prediction, {name: torch.cat([own.maps[name], others.maps[name]]) for name in own.maps}


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("kinds", KINDS, ids=["text first", "text later"])
@pytest.mark.parametrize("first", [1, 2, 4])
def test_maps_and_predictions_are_those_of_two_passes(taps, kinds, first):
    backbone = backbone_of(kinds)
    chosen = backbone.parse_taps(taps)
    with torch.no_grad():
        wanted, maps = by_two_passes(backbone, chosen, first)
        for pictures in (None, PICTURES):
            prediction, features = backbone.predict(*inputs(backbone), chosen, pictures=pictures, predicted=first)
            assert prediction.shape == (first, 4, 8, 12) and len(features) == 5
            torch.testing.assert_close(prediction, wanted, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(features.timesteps, inputs(backbone)[1])
            for name, value in maps.items():
                torch.testing.assert_close(features.maps[name], value, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.denoiser.modules())


def test_rows_that_cannot_be_are_refused():
    backbone = tiny_backbone()
    for taps, predicted in (("up1", 0), ("up1", 6), (None, 2)):
        chosen = () if taps is None else backbone.parse_taps(taps)
        with pytest.raises(ValueError, match=f"{predicted} of 5 rows"):
            backbone.predict(*inputs(backbone), chosen, pictures=PICTURES, predicted=predicted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("taps", ["up1", "up_blocks.1.attentions.1", "bottom1"])
def test_gradients_are_those_of_two_passes(taps, checkpointing):
    backbone = tiny_backbone()
    parameters = add_lora(backbone, rank=2)
    for number, parameter in enumerate(parameters):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    if checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()
        backbone.denoiser.train()
    chosen = backbone.parse_taps(taps)

    def gradients(prediction, maps):
        loss = prediction.square().sum() + sum(value.square().sum() for value in maps.values())
        return torch.autograd.grad(loss, parameters)

    wanted = gradients(*by_two_passes(backbone, chosen, 2))
    prediction, features = backbone.predict(*inputs(backbone), chosen, pictures=PICTURES, predicted=2)
    scale = max(two.norm() for two in wanted)  # some get none: the middle attends from one place to itself
    for one, two in zip(gradients(prediction, features.maps), wanted, strict=True):
        assert (one - two).norm() <= 1e-5 * two.norm() + 1e-7 * scale
    assert sum(two.norm() > 1e-3 * scale for two in wanted) > len(wanted) / 2


@pytest.mark.parametrize(
    ("taps", "behind"),
    [
        ("up1", ("up_blocks.2", "up_blocks.3")),
        ("bottom0_up1", ("up_blocks.2", "up_blocks.3")),
        ("mid", ("up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3")),
        ("up_blocks.1.attentions.1", ("up_blocks.1.upsamplers.0", "up_blocks.2", "up_blocks.3")),
        ("up_blocks.1.attentions.0", ("up_blocks.2", "up_blocks.3")),  # behind it the block joins a skip
        ("up_blocks.0.resnets.1", ("up_blocks.1", "up_blocks.2", "up_blocks.3")),
        ("up1_up_blocks.1.attentions.1", ("up_blocks.2", "up_blocks.3")),  # up1 is read behind the sampler
        ("up_blocks.1.attentions.1_up_blocks.1.upsamplers.0", ("up_blocks.2", "up_blocks.3")),
        ("bottom2_bottom0", ("down_blocks.3", "mid_block", *(f"up_blocks.{i}" for i in range(4)))),
        ("up3", ()),
        ("up_blocks.3.attentions.1", ()),
    ],
)
def test_what_lies_behind(taps, behind):
    backbone = tiny_backbone()
    assert behind_taps(backbone.denoiser, backbone.parse_taps(taps)) == behind
    assert behind_taps(backbone.denoiser, ()) == ()
    assert behind_taps(backbone.denoiser, (replace(backbone.taps["up1"], module="conv_in"),)) == ()  # in no block


def test_a_denoiser_without_a_middle():
    unet = SimpleNamespace(down_blocks=[1, 2], mid_block=None, up_blocks=[1, 2])
    assert behind_taps(unet, (tiny_backbone().taps["bottom1"],)) == ("up_blocks.0", "up_blocks.1")


def rows_seen(backbone, run, paths):
    """Rows of the first argument of each module in one pass: hooks lie around `forward`."""
    seen = {}
    modules = {path: backbone.denoiser.get_submodule(path) for path in paths}

    def watched(path, forward):
        def call(*args, **kwargs):
            value = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(path, []).append(len(value))
            return forward(*args, **kwargs)

        return call

    for path, module in modules.items():
        module.forward = watched(path, module.forward)
    run()
    for module in modules.values():
        del module.forward
    return seen


def test_what_is_only_read_goes_no_further_and_what_is_common_is_computed_once():
    backbone = tiny_backbone()
    paths = ("conv_in", "down_blocks.1.resnets.0", "up_blocks.1.attentions.1", "up_blocks.2.resnets.0", "conv_out")
    chosen = backbone.parse_taps("up1")

    noisy, timesteps, text = inputs(backbone)

    def run():
        return backbone.predict(noisy, timesteps, text, chosen, pictures=PICTURES, predicted=2)

    assert rows_seen(backbone, run, paths) == dict(zip(paths, ([2], [5], [5], [2], [2]), strict=True))
    last = backbone.parse_taps("up3")  # nothing lies behind it: two passes, of which the second ends there
    for taps, pictures in ((last, PICTURES), (chosen, None), (chosen, torch.arange(5))):  # or nothing is common
        seen = rows_seen(backbone, lambda t=taps, p=pictures: backbone.predict(noisy, timesteps, text, t, p, 2), paths)
        assert len(seen["conv_in"]) == 2 and seen["conv_out"] == [2]

    def flops(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    # By two passes picture 0 and 1 are each begun twice: of all that lies before the text, two rows more.
    channels, pixels, time = 8, 96, 32
    convolutions = 2 * 9 * pixels * (4 * channels + 2 * channels**2)
    each = convolutions + 2 * time * channels + 4 * 2 * pixels * channels**2
    rows = torch.arange(5)

    def apart():
        backbone.predict(noisy[:2], timesteps[:2], text.select(rows[:2]), chosen, pictures=PICTURES[:2])
        backbone.features(noisy[2:], timesteps[2:], text.select(rows[2:]), chosen, pictures=PICTURES[2:])

    assert flops(apart) - flops(run) == 2 * each
