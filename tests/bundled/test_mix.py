"""A mix of LoRAs changes the weights by the weighted sum of what each changes."""

import importlib
from pathlib import Path

import pytest
import torch

from dpt_t2i.backbones.lora import add_lora, load_lora, remove_lora, save_lora
from dpt_t2i.backbones.lora_files import LoraLayer
from tests.tiny import tiny_backbone, tiny_pipeline


@pytest.fixture
def mix(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools/bundled")
    return importlib.import_module("mix")


def deltas(backbone):
    return {
        name: module.get_delta_weight("dpt")
        for name, module in backbone.denoiser.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_weights_add_up_whatever_rank(mix, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    backbone, changes = tiny_backbone(), []
    for number, rank in enumerate((2, 3)):
        for parameter in add_lora(backbone, rank):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
        changes.append({name: delta.clone() for name, delta in deltas(backbone).items()})
        save_lora(backbone, tmp_path / str(number), {})
        remove_lora(backbone)
    parts = [str(tmp_path / "0"), "0.75", str(tmp_path / "1"), "-0.5"]
    mix.main([*parts, "--out", str(tmp_path / "mix"), "--base", str(tmp_path / "base")])
    load_lora(backbone, tmp_path / "mix")
    found = deltas(backbone)
    assert found.keys() == changes[0].keys() and len(found) > 10
    for name, delta in found.items():
        torch.testing.assert_close(delta, 0.75 * changes[0][name] - 0.5 * changes[1][name], rtol=1e-5, atol=1e-6)


def test_alpha_counts_and_a_module_of_one_lora_is_kept(mix):
    down, up = torch.ones(2, 3), torch.full((4, 2), 2.0)
    both = mix.mixed(
        [{"unet.a": LoraLayer(down, up, alpha=4.0)}, {"unet.b": LoraLayer(down, up, alpha=2.0)}], [0.5, 3.0]
    )
    a, b = (both[f"unet.{n}.lora_B.weight"] @ both[f"unet.{n}.lora_A.weight"] for n in "ab")
    torch.testing.assert_close(a, torch.full((4, 3), 0.5 * 2 * 4.0))  # weight, alpha / rank, the product
    torch.testing.assert_close(b, torch.full((4, 3), 3.0 * 1 * 4.0))
