"""Samples during tuning, and whether they and the LoRA say that anything changed."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dpt_t2i.backbones.lora import add_lora, lora_change, lora_parameters
from dpt_t2i.config import SamplesConfig
from dpt_t2i.training.samples import SIDE, Samples, _difference, sheet
from tests.tiny import tiny_adapter, tiny_backbone

QUICK = SamplesConfig(sample_steps=2, sample_guidance=2.0, sample_correct=0.5)


def test_a_fresh_lora_changes_nothing_and_a_grown_one_by_its_norm():
    backbone = tiny_backbone()
    assert lora_change(backbone) == 0.0
    add_lora(backbone, 2, alpha=4.0)
    assert lora_change(backbone) == 0.0
    with torch.no_grad():
        for parameter in lora_parameters(backbone):
            parameter.fill_(0.1)
    layers = [module for module in backbone.denoiser.modules() if hasattr(module, "lora_A")]
    # each entry of B A is 2 x 0.1 x 0.1, times alpha / rank = 2
    added = sum(0.04**2 * layer.base_layer.weight.numel() for layer in layers)
    own = sum(float(layer.base_layer.weight.square().sum()) for layer in layers)
    assert lora_change(backbone) == pytest.approx(math.sqrt(added / own), rel=1e-5)


def test_samples_show_base_tuned_and_corrected(tmp_path):
    backbone = tiny_backbone()
    add_lora(backbone, 2)
    samples = Samples(
        backbone, tiny_adapter(backbone), backbone.parse_taps("up1"), ["a red circle", "two stars"], QUICK, tmp_path
    )
    backbone.denoiser.train()
    state = torch.get_rng_state()
    assert samples(7) == {"lora_norm": 0.0, "image_change": 0.0}
    assert torch.equal(torch.get_rng_state(), state) and backbone.denoiser.training
    with Image.open(tmp_path / "samples" / "step-000007.png") as picture:
        before = np.asarray(picture).astype(int)
    base, tuned, corrected = np.split(before[14:], 3, axis=1)
    assert before.shape[1] == 3 * SIDE
    assert np.array_equal(base[14:SIDE], tuned[14:SIDE]) and not np.array_equal(base[14:SIDE], corrected[14:SIDE])
    with torch.no_grad():
        for parameter in lora_parameters(backbone):
            parameter.fill_(0.3)
    figures = samples(8)
    assert figures["lora_norm"] > 0 and figures["image_change"] > 0
    assert [p.requires_grad for p in lora_parameters(backbone)] == [True] * len(lora_parameters(backbone))
    with Image.open(tmp_path / "samples" / "step-000008.png") as picture:
        again, changed, _ = np.split(np.asarray(picture).astype(int)[14:], 3, axis=1)
    assert np.array_equal(again, base), "the same prompts and seeds"
    assert not np.array_equal(changed, tuned)


def test_the_base_is_drawn_without_a_lora_that_is_grown_already(tmp_path):
    """As in a run that goes on from a checkpoint: its first samples already have a LoRA."""
    backbone = tiny_backbone()
    add_lora(backbone, 2)
    with torch.no_grad():
        for parameter in lora_parameters(backbone):
            parameter.fill_(0.3)
    assert Samples(backbone, None, (), ["a star"], QUICK, tmp_path)(1)["image_change"] > 0


def test_without_an_adapter_there_is_no_correction(tmp_path):
    backbone = tiny_backbone()
    add_lora(backbone, 2)
    Samples(backbone, None, (), ["a star"], QUICK, tmp_path)(1)
    with Image.open(tmp_path / "samples" / "step-000001.png") as picture:
        assert picture.size == (2 * SIDE, 14 + 14 + SIDE)


def test_the_difference_is_in_levels():
    grey = [Image.new("RGB", (4, 4), (level,) * 3) for level in (10, 20, 40)]
    assert _difference(grey[:2], grey[1:]) == pytest.approx((10 + 20) / 2)


def test_a_large_picture_shrinks_and_a_long_prompt_in_any_script_is_drawn():
    page = sheet(["красный круг"], {"base": [Image.new("RGB", (1024, 512))]})
    assert page.size == (SIDE, 28 + SIDE // 2)
