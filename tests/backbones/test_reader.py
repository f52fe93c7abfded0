"""Reading features: equal to a hook written by hand, equal with and without early exit, and nothing left behind."""

import pytest
import torch
from torch import nn

from dpt_t2i.backbones.lora import add_lora
from dpt_t2i.backbones.reader import read_maps
from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError
from tests.tiny import tiny_backbone

TIMESTEPS = torch.tensor([500, 37])


def inputs(backbone):
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return noisy, TIMESTEPS, backbone.encode_text(["a red circle", "two blue stars"])


def hooks_on(module: nn.Module) -> int:
    return sum(len(inner._forward_hooks) for inner in module.modules())


def manual_map(backbone, path: str, noisy, text) -> torch.Tensor:
    caught = []
    handle = backbone.denoiser.get_submodule(path).register_forward_hook(lambda *args: caught.append(args[-1]))
    with torch.no_grad():
        backbone.pipeline.unet(noisy, TIMESTEPS, encoder_hidden_states=text.tokens)
    handle.remove()
    return caught[0] if isinstance(caught[0], torch.Tensor) else caught[0][0]


def test_features_are_the_blocks_own_outputs_bit_for_bit():
    backbone = tiny_backbone()
    noisy, timesteps, text = inputs(backbone)
    for tap in (*backbone.taps.values(), *backbone.parse_taps("up_blocks.1.attentions.0")):
        with torch.no_grad():
            early = backbone.features(noisy, timesteps, text, [tap]).maps[tap.name]
            _, late = backbone.predict(noisy, timesteps, text, [tap])
        assert torch.equal(early, manual_map(backbone, tap.module, noisy, text)), tap.name
        assert torch.equal(early, late.maps[tap.name]), tap.name
    assert hooks_on(backbone.denoiser) == 0


def test_maps_come_in_the_order_asked_for():
    backbone = tiny_backbone()
    noisy, timesteps, text = inputs(backbone)
    features = backbone.features(noisy, timesteps, text, backbone.parse_taps("up1_bottom0"))
    assert list(features.maps) == ["up1", "bottom0"]
    assert torch.equal(features.timesteps, timesteps)


def test_an_early_exit_skips_what_lies_behind_the_deepest_tap():
    backbone = tiny_backbone()
    noisy, timesteps, text = inputs(backbone)
    ran = []
    for name in ("mid_block", "up_blocks.0", "up_blocks.1", "conv_out"):
        backbone.denoiser.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    backbone.features(noisy, timesteps, text, backbone.parse_taps("up0_bottom1"))
    assert ran == ["mid_block", "up_blocks.0"]


@pytest.mark.parametrize("tap", ["up1", "up_blocks.1.resnets.1"])
def test_gradients_reach_latents_and_lora_and_checkpointing_changes_nothing(tap):
    backbone = tiny_backbone()
    parameters = add_lora(backbone, rank=2)
    for number, parameter in enumerate(parameters):  # B = 0 would hide the gradient of A
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    noisy, timesteps, text = inputs(backbone)

    def gradients():
        point = noisy.clone().requires_grad_(True)
        value = backbone.features(point, timesteps, text, backbone.parse_taps(tap)).maps[tap].square().sum()
        # The last blocks' LoRA lies behind the tap and takes no part.
        return torch.autograd.grad(value, [point, *parameters], allow_unused=True)

    plain = gradients()
    backbone.pipeline.unet.enable_gradient_checkpointing()
    backbone.pipeline.unet.train()  # diffusers checkpoints in training mode only
    checkpointed = gradients()
    assert plain[0].abs().max() > 0
    used = [gradient for gradient in plain[1:] if gradient is not None]
    assert 0 < len(used) < len(parameters)
    assert all(gradient.abs().max() > 0 for gradient in used)
    for one, other in zip(plain, checkpointed, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert hooks_on(backbone.denoiser) == 0


def test_no_hook_stays_when_the_pass_itself_fails():
    backbone = tiny_backbone()
    text = backbone.null_text(1)
    with pytest.raises(RuntimeError):
        backbone.features(torch.zeros(1, 3, 8, 8), torch.tensor([1]), text, backbone.parse_taps("up1"))
    assert hooks_on(backbone.denoiser) == 0


def test_a_module_outside_the_forward_pass_is_named():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model.unused = nn.Identity()
    taps = [Tap("ghost", "unused", 1, 1)]
    with pytest.raises(InputError, match="ghost.*unused"):
        read_maps(model, taps, lambda: model[0](torch.zeros(1)), early_exit=True)


def test_of_a_module_that_runs_several_times_the_first_is_read_in_either_pass():
    backbone = tiny_backbone()
    noisy, timesteps, text = inputs(backbone)
    taps = (Tap("twice", "down_blocks.0.resnets.0.nonlinearity", 8, 1),)  # before either convolution
    with torch.no_grad():
        early = backbone.features(noisy, timesteps, text, taps).maps["twice"]
        late = backbone.predict(noisy, timesteps, text, taps)[1].maps["twice"]
    assert torch.equal(early, late)
