"""SD 3 and FLUX the whole way: probe, tune, generate with correction, and the LoRA in stock diffusers."""

from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

import dpt_t2i
from dpt_t2i.config import ProbeConfig, TuneConfig, build_config
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.tune import run_tune
from tests.families import save_flux, save_sd3
from tests.training.conftest import SMALL

PROMPT = "a red circle above two blue stars"
FAMILIES = {
    "sd3": (save_sd3, diffusers.StableDiffusion3Pipeline, "block1"),
    "flux": (save_flux, diffusers.FluxPipeline, "double1_single0"),
}
SETTINGS = {"max_samples": 8, "val_samples": 2, "train_batch_size": 1, "checkpointing_steps": 100}


def difference(one: Image.Image, other: Image.Image) -> int:
    """Grey levels."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """(family, base folder, run folder of stage 2 after 3 steps)."""
    save, _, tap = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    base = save(root / "base")
    common = SMALL | SETTINGS | {"pretrained_model_name_or_path": str(base), "tap": tap}
    run_probe(build_config(ProbeConfig, overrides=common | {"output_dir": str(root / "probe")}))
    tune = {"output_dir": str(root / "tune"), "adapter": str(root / "probe" / "adapter"), "max_train_steps": 3}
    run_tune(build_config(TuneConfig, overrides=common | tune | {"learning_rate": 0.05}))
    return request.param, base, root / "tune"


def test_both_stages_learn(trained):
    _, _, run = trained
    lora = load_file(run / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") for key in lora)
    assert all(value.abs().max() > 0 for value in lora.values())
    before, after = (load_file(folder / "adapter" / "model.safetensors") for folder in (run.parent / "probe", run))
    assert before.keys() == after.keys()
    assert not [name for name, value in before.items() if torch.equal(value, after[name])]


@pytest.mark.parametrize("mode", ["state", "noise"])
def test_a_corrected_image_comes_from_the_tuned_model(trained, mode):
    _, base, run = trained
    model = dpt_t2i.load(str(base), lora=str(run), device="cpu")
    how = {"steps": 2, "guidance_scale": 3.0, "scheduler": "euler"}
    corrected = {"correct": 0.2, "correction_rule": "relative", "correction_mode": mode}
    plain, again, moved = (
        model.generate(PROMPT, 1, **how, **more)[0] for more in ({}, {}, corrected)
    )  # fmt: skip
    assert plain.size == (32, 32) and difference(plain, again) == 0
    assert difference(plain, moved) > 0
    assert -1 <= model.score(plain, PROMPT).score <= 1


def test_stock_diffusers_makes_the_same_image_with_the_lora(trained):
    family, base, run = trained
    how = {"steps": 2, "guidance_scale": 3.0, "scheduler": "euler"}
    tuned = dpt_t2i.load(str(base), lora=str(run), adapter="none", device="cpu").generate(PROMPT, 1, **how)[0]
    absent = {"image_encoder": None, "feature_extractor": None}
    pipeline = FAMILIES[family][1].from_pretrained(base, **absent)
    pipeline.set_progress_bar_config(disable=True)

    def make() -> Image.Image:
        generator = torch.Generator().manual_seed(1)
        return pipeline(
            PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=generator, height=32, width=32
        ).images[0]

    plain = make()
    pipeline.load_lora_weights(run)
    assert difference(make(), tuned) <= 1
    assert difference(plain, tuned) > 1
