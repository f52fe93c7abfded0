"""Feature maps of every tap, with and without LoRA, against the release."""

import pytest
import torch

from dpt_t2i.backbones.types import TextStates
from tests.parity.golden import backbone, close, needs_shared, numbers, tensors

pytestmark = needs_shared
TAPS = ["bottom0", "bottom1", "bottom2", "bottom3", "mid", "up0", "up1", "up2", "up3"]


def text() -> TextStates:
    """The golden texts through our own encoder."""
    return backbone(lora=False).encode_text(numbers("features")["texts"])


def test_texts_are_the_releases() -> None:
    golden, ours = tensors("features"), text()
    close(ours.tokens, golden["encoder_hidden_states"])
    close(ours.pooled, golden["pooler_output"])


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@torch.no_grad()
def test_every_map_and_the_prediction_of_one_pass(lora: bool) -> None:
    golden, kind, states = tensors("features"), "lora" if lora else "base", text()
    model = backbone(lora)
    taps = model.parse_taps("_".join(TAPS))
    prediction, features = model.predict(golden["noisy_latents"], golden["timesteps"], states, taps)
    assert list(features.maps) == TAPS
    for name, ours in features.maps.items():
        close(ours, golden[f"{kind}.{name}"])
    close(prediction, golden[f"{kind}.noise_pred"])


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("tap", TAPS)
@torch.no_grad()
def test_leaving_early_changes_no_bit(tap: str, lora: bool) -> None:
    """The release then calls the hidden state `noise_pred` (`sample_is_feature`); ours gives features and no noise."""
    golden, kind, states = tensors("features"), "lora" if lora else "base", text()
    model = backbone(lora)
    taps, given = model.parse_taps(tap), (golden["noisy_latents"], golden["timesteps"], states)
    early = model.features(*given, taps).maps
    assert list(early) == [tap] and torch.equal(early[tap], model.predict(*given, taps)[1].maps[tap])
    close(early[tap], golden[f"{kind}.{tap}"])
    theirs = numbers("features")[f"{kind}.early_exit.{tap}"]
    if theirs["sample_is_feature"]:
        assert list(early[tap].shape) == theirs["sample_shape"]


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@torch.no_grad()
def test_latents_that_are_no_multiple_of_eight(lora: bool) -> None:
    golden, kind, states = tensors("features"), "lora" if lora else "base", text()
    model = backbone(lora)
    noisy = golden["odd.noisy_latents"]
    prediction, features = model.predict(noisy, golden["timesteps"], states, model.parse_taps("up1"))
    close(features.maps["up1"], golden[f"odd.{kind}.up1"])
    close(prediction, golden[f"odd.{kind}.noise_pred"])
    early = model.features(noisy, golden["timesteps"], states, model.parse_taps("up1"))
    assert torch.equal(early.maps["up1"], features.maps["up1"])
