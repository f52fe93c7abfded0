"""Every family through the real commands: probe, tune, generate with correction, and back from the files alone."""

from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dpt_t2i
from dpt_t2i.backbones.lora import LORA_FILE, read_lora_header
from dpt_t2i.cli import main
from tests.families import FAMILIES

# family -> (tap to read, prefix of the keys in its LoRA file, how many projections carry a LoRA)
CASES = {
    "sd2_v": ("up1", "unet.", 10 * 2 * 4),  # 3 attentions down, 1 in the middle, 6 up; self and cross; q, k, v, out
    "sdxl": ("up0", "unet.", (2 + 2 * 2 + 2 + 3 * 2 + 3) * 2 * 4),  # transformer layers: 1 and 2 in the deeper levels
    "pixart_sigma": ("block1", "transformer.", 3 * 2 * 4),
    "sd3": ("block1", "transformer.", 3 * 8 + 4 - 2),  # image and text; dual attention once; the text stream ends
    "flux": ("single0", "transformer.", 2 * 8 + 2 * 3),  # double blocks; q, k, v of the single ones
}
# family -> the stock pipeline that reads its LoRA file
STOCK = {
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
}
SMALL = {
    "resolution": 32,
    "val_samples": 2,
    "max_samples": 20,
    "hidden_dim": 16,
    "num_heads": 2,
    "dim_feedforward": 16,
    "num_queries_matching": 2,
    "num_queries_rec": 3,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "device": "cpu",
}


def run(command: str, **settings) -> None:
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    assert main([command, *flags]) == 0


@pytest.mark.parametrize("family", CASES)
def test_from_probe_to_a_reloaded_image(family, tmp_path):
    tap, prefix, projections = CASES[family]
    base = FAMILIES[family](tmp_path / "base")
    model = {"pretrained_model_name_or_path": base}
    run("probe", **model, **SMALL, tap=tap, max_train_steps=2, output_dir=tmp_path / "probe")
    adapter = tmp_path / "probe" / "adapter"
    tuned = tmp_path / "tune"
    run("tune", **model, **SMALL, tap=tap, adapter=adapter, max_train_steps=3, output_dir=tuned)
    lora = load_file(tuned / LORA_FILE)
    assert len(lora) == 2 * projections
    assert all(key.startswith(prefix) for key in lora)
    assert all(value.abs().max() > 0 for value in lora.values()), "three steps moved every projection"
    assert read_lora_header(tuned)["base"]["name"] == "base"

    sampling = {"steps": 3, "guidance_scale": 3.0, "correct": 0.5, "correction_rule": "relative"}
    images = tmp_path / "images"
    run("generate", **model, device="cpu", lora=tuned, prompt="a red circle", output_dir=images, **sampling)
    made = read(images / "images" / "00000_0.png")

    again = dpt_t2i.load(str(base), lora=str(tuned), device="cpu")  # the adapter beside the LoRA is found by itself
    assert torch.equal(pixels(again.generate("a red circle", 0, **sampling)[0]), made)
    plain = dpt_t2i.load(str(base), lora="none", adapter=str(tuned / "adapter"), device="cpu")
    assert not torch.equal(pixels(plain.generate("a red circle", 0, **sampling)[0]), made), "the LoRA shows"
    uncorrected = again.generate("a red circle", 0, **(sampling | {"correct": 0.0}))[0]
    assert not torch.equal(pixels(uncorrected), made), "the correction shows"
    if family in STOCK:
        stock = stock_image(family, base, tuned)
        assert (pixels(uncorrected).int() - pixels(stock).int()).abs().max() <= 1, "stock diffusers reads the LoRA"


def stock_image(family: str, base: Path, lora: Path) -> Image.Image:
    pipeline = STOCK[family].from_pretrained(base, image_encoder=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 32, "width": 32}
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **settings).images[0]


def read(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return pixels(image)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
