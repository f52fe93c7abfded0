"""Where method and release part (docs/deviations.md): both numbers, for what needs no large golden."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.official import adapter_from_official, sort_official
from dpt_t2i.backbones.types import Features
from dpt_t2i.config import TuneTrainConfig
from dpt_t2i.data.examples import Examples, View
from dpt_t2i.data.records import Record
from dpt_t2i.data.transforms import fit_square
from dpt_t2i.objectives.denoise import denoise_loss
from dpt_t2i.training.engine import _rate_factor

GOLDEN = load_file(Path(__file__).parent / "adapter.safetensors")
PREFIX = "checkpoint."
STATE = sort_official({k.removeprefix(PREFIX): v.clone() for k, v in GOLDEN.items() if k.startswith(PREFIX)}).adapter
FEATURES = Features({"up1": GOLDEN["features.up1"]}, GOLDEN["timesteps"])


@torch.no_grad()
def test_features_are_normalised_unless_imported() -> None:
    imported, _ = adapter_from_official(STATE, {"up1": 40}, num_heads=4)
    torch.testing.assert_close(imported(FEATURES).match_embeds, GOLDEN["up1.q_emb_matching"][0], rtol=1e-4, atol=2e-5)
    config = imported.config.model_copy(update={"normalize_features": True})
    ours = DiscriminativeAdapter(config, {"up1": 40}, 64, 48).eval()
    ours.load_state_dict(imported.state_dict(), strict=False)  # all but the norm, which starts as the identity
    difference = (ours(FEATURES).match_embeds - GOLDEN["up1.q_emb_matching"][0]).abs().max()
    assert float(difference) > 1e-3


@torch.no_grad()
def test_of_several_decoder_layers_the_last_matches() -> None:
    """The release's matching reads layer 0: the same as if the second layer were not there."""
    second = {
        key.replace("decoder.layers.0", "decoder.layers.1"): 0.5 * value
        for key, value in STATE.items()
        if key.startswith("transformer.decoder.layers.0")
    }
    one, _ = adapter_from_official(STATE, {"up1": 40}, num_heads=4)
    two, _ = adapter_from_official(STATE | second, {"up1": 40}, num_heads=4)
    assert two.config.dec_layers == 2
    torch.testing.assert_close(one(FEATURES).match_embeds, GOLDEN["up1.q_emb_matching"][0], rtol=1e-4, atol=2e-5)
    assert float((two(FEATURES).match_embeds - GOLDEN["up1.q_emb_matching"][0]).abs().max()) > 1e-3


def test_the_cosine_reaches_its_end() -> None:
    """The release makes the schedule 8 times longer than the steps it takes on one GPU: it ends at 96 % of the rate."""
    settings = TuneTrainConfig()
    steps, accumulation = settings.max_train_steps, settings.gradient_accumulation_steps
    theirs = 0.5 * (1 + math.cos(math.pi * steps / (steps * accumulation)))
    assert theirs == pytest.approx(0.962, abs=1e-3)
    assert _rate_factor(settings)(steps - 1) < 1e-6 and _rate_factor(settings)(steps // 2) == pytest.approx(0.5)


def test_a_picture_is_not_squashed() -> None:
    """A box 20 x 20 of a 64 x 32 picture: squashed to 32 x 32 it is 10 wide and 20 high; ours stays square."""
    square, boxes = fit_square(Image.new("RGB", (64, 32)), [(22.0, 6.0, 20.0, 20.0)], 32)
    theirs = (20 / 64 * 32, 20 / 32 * 32)
    assert theirs == (10.0, 20.0)
    assert square.size == (32, 32) and (boxes[0, 2:] * 32).tolist() == pytest.approx([20.0, 20.0])


def test_a_flip_cannot_turn_bright_into_bleft() -> None:
    """The release swaps substrings, so that 58 prompts of ABC-6K lose a word; here a text is never changed: "bright" is
    mirrored as it stands, and where a text names a side nothing is."""
    assert "a bright bus".replace("right", "left") == "a bleft bus"
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # a column tells whether it was mirrored

    def shown(caption: str) -> tuple[set[str], set[float]]:
        records = [Record(str(i), "toy", lambda: ramp, (caption,)) for i in range(2)]
        items = [Examples(records, 16, view=View(random_flip=True)).item(epoch, 0) for epoch in range(16)]
        return {item.caption for item in items}, {round(float(item.pixels[0, 0, 0]), 3) for item in items}

    captions, corners = shown("a bright bus")
    assert captions == {"a bright bus"} and len(corners) == 2
    captions, corners = shown("a bus on the right")
    assert captions == {"a bus on the right"} and len(corners) == 1


def test_min_snr_of_a_predicted_velocity() -> None:
    """The release weighs v as it weighs noise: min(SNR, gamma) / SNR. By hand, gamma 5: SNR 8 and 2, errors 1 and 4."""
    snr, prediction = torch.tensor([8.0, 2.0]), torch.tensor([[1.0], [2.0]])
    theirs = (5 / 8 * 1 + 2 / 2 * 4) / 2
    ours = (5 / 9 * 1 + 2 / 3 * 4) / 2
    given = {"snr": snr, "snr_gamma": 5.0}
    zeros = torch.zeros(2, 1)
    assert float(denoise_loss(prediction, zeros, **given)) == pytest.approx(theirs)  # of predicted noise both agree
    assert float(denoise_loss(prediction, zeros, **given, prediction_type="v_prediction")) == pytest.approx(ours)
    # An error of v is one of the clean latent times SNR + 1, of noise times SNR: so the same weight on that latent.
    assert theirs == pytest.approx((5 * (1 / 8) + 2 * (4 / 2)) / 2)
    assert ours == pytest.approx((5 * (1 / 9) + 2 * (4 / 3)) / 2)
