"""The adapter behind every tap and combination of taps, from latents to heads, against the release."""

import pytest
import torch
from torch import Tensor

from dpt_t2i.adapter.grounding_text import load_grounding_text
from dpt_t2i.adapter.official import adapter_from_official
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.types import Features
from tests.parity.golden import HEADS, SHARED, adapter, backbone, checkpoint, close, needs_shared, numbers, tensors

pytestmark = needs_shared
SIZE_48_12 = (48, 12)


def golden_taps() -> list[str]:
    """Whatever combinations the goldens hold."""
    return numbers("adapter")["features"] if (SHARED / "adapter" / "adapter.json").is_file() else []


def own(tap: str) -> dict[str, Tensor]:
    prefix = f"{tap}.own."
    return {key.removeprefix(prefix): v for key, v in tensors("adapter").items() if key.startswith(prefix)}


@torch.no_grad()
def read(tap: str) -> AdapterOutput:
    features, golden = tensors("features"), tensors("adapter")
    model = backbone(lora=True)
    text = model.encode_text(numbers("features")["texts"])
    maps = model.features(features["noisy_latents"], features["timesteps"], text, model.parse_taps(tap))
    output: AdapterOutput = adapter(tap, own(tap))(maps, golden["roberta.last_hidden_state"])
    return output


@pytest.mark.parametrize("tap", golden_taps())
def test_heads_of_every_tap(tap: str) -> None:
    golden, ours = tensors("adapter"), read(tap)
    found = {
        "q_emb_matching": ours.match_embeds[None],  # the release stacks its decoder layers in front
        "pred_logits": ours.logits,
        "pred_boxes": ours.boxes,
        "proj_queries": ours.query_align,
        "proj_tokens": ours.token_align,
        "logit_scale": ours.logit_scale,
    }
    for name, value in found.items():
        assert value is not None
        close(value, golden[f"{tap}.{name}"])


def test_captions_through_roberta() -> None:
    golden = tensors("adapter")
    text = load_grounding_text(str(SHARED / "roberta"), torch.device("cpu"))(numbers("adapter")["text"])
    assert torch.equal(text.mask, golden["roberta.attention_mask"].bool())
    close(text.tokens[text.mask], golden["roberta.last_hidden_state"][text.mask])


@torch.no_grad()
def test_a_pass_after_an_early_one_is_whole_again() -> None:
    features = tensors("features")
    read("up1")
    model = backbone(lora=True)
    text = model.encode_text(numbers("features")["texts"])
    whole = model.predict(features["noisy_latents"], features["timesteps"], text)[0]
    close(whole, tensors("adapter")["all_then_up1.noise_pred"])


@torch.no_grad()
def test_all_maps_fused_as_the_release_fuses_them() -> None:
    """`all-48-12`: nearest to 12 x 12, each map through its own projection to 48, summed; then the one projection."""
    features, golden = tensors("features"), tensors("adapter")
    model = backbone(lora=True)
    taps = model.parse_taps("all-48-12")
    generator = torch.Generator().manual_seed(11)
    extra = {"input_proj.weight": torch.randn(64, 48, 1, 1, generator=generator) / 7}
    for index, tap in enumerate(taps):
        extra[f"fusion_proj.{index}.weight"] = torch.randn(48, tap.channels, 1, 1, generator=generator) / 6
        extra[f"fusion_proj.{index}.bias"] = torch.randn(48, generator=generator)
    text = model.encode_text(numbers("features")["texts"])
    maps = model.features(features["noisy_latents"], features["timesteps"], text, taps)
    ours = adapter("all-48-12", extra)(maps, golden["roberta.last_hidden_state"])
    summed = torch.zeros(2, 48, 12, 12)
    for index, one in enumerate(maps.maps.values()):
        resized = torch.nn.functional.interpolate(one, size=(12, 12))
        weight, bias = extra[f"fusion_proj.{index}.weight"], extra[f"fusion_proj.{index}.bias"]
        summed = summed + torch.nn.functional.conv2d(resized, weight, bias)
    plain = checkpoint().adapter | {"input_proj.weight": extra["input_proj.weight"]}
    single, _ = adapter_from_official(plain, {"x": 48}, num_heads=HEADS)  # reads the sum as if it were one tap's map
    wanted = single(Features({"x": summed}, features["timesteps"]), golden["roberta.last_hidden_state"])
    close(ours.match_embeds, wanted.match_embeds)
    close(ours.boxes, wanted.boxes)


@pytest.mark.parametrize("tap", ["up1_bottom0", "mid_up2", "bottom0_bottom3_up0_up3", "all", "mid_up1-20-6"])
@torch.no_grad()
def test_any_combination_works(tap: str) -> None:
    """Also of maps of different sizes, which the release cannot join."""
    taps = backbone(lora=True).parse_taps(tap)
    width = 20 if tap.endswith("-20-6") else sum(one.channels for one in taps)
    extra = {"input_proj.weight": torch.randn(64, width, 1, 1, generator=torch.Generator().manual_seed(1)) / 8}
    if tap.endswith("-20-6"):
        for index, one in enumerate(taps):
            extra[f"fusion_proj.{index}.weight"] = torch.ones(20, one.channels, 1, 1)
            extra[f"fusion_proj.{index}.bias"] = torch.zeros(20)
    features, model = tensors("features"), backbone(lora=True)
    text = model.encode_text(numbers("features")["texts"])
    maps = model.features(features["noisy_latents"], features["timesteps"], text, taps)
    output = adapter(tap, extra)(maps)
    assert output.boxes.shape == (2, 20, 4) and bool(output.match_embeds.isfinite().all())
