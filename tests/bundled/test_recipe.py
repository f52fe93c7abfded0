"""`make bundled` from nothing, each stage cut very short: the stages fit together, go on where they stopped, and stock
diffusers loads what comes out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer

import dpt_t2i

ROOT = Path(__file__).parents[2]
SHORT = {"vae": 64, "text": 512, "unet": 288}  # samples


def run(cwd: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done.stdout + done.stderr


def stage(cwd: Path, name: str, *flags: str) -> str:
    samples = ("--samples", str(SHORT[name])) if name in SHORT else ()
    return run(cwd, str(ROOT / f"tools/bundled/{name}.py"), *samples, *flags)


def train(cwd: Path, command: str, config: str) -> str:
    short = ("--max_train_steps", "1", "--train_batch_size", "4", "--validation_steps", "1000", "--device", "cpu")
    base = ("--pretrained_model_name_or_path", "src/dpt_t2i/bundled/base")
    return run(cwd, "-m", "dpt_t2i", command, "--config", f"configs/bundled/{config}.yaml", *base, *short)


@torch.no_grad()
def roll_channels(folder: Path) -> None:
    """The same text encoder, whose states come out with every channel one place further on."""
    encoder = CLIPTextModel.from_pretrained(folder)
    for name, value in encoder.named_parameters():
        reads = ("embedding.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")
        if name.endswith(reads):
            value.copy_(value.roll(1, dims=1))
        elif any(part in name for part in ("layer_norm", "out_proj", "fc2")):
            value.copy_(value.roll(1, dims=0))
    encoder.save_pretrained(folder)


@torch.no_grad()
def read_by(unet: Path, text_encoder: Path) -> torch.Tensor:
    """What a denoiser's cross-attention makes of a caption's states: keys and values of every layer, side by side."""
    tokenizer = CLIPTokenizer.from_pretrained(text_encoder.parent / "tokenizer")
    ids = tokenizer(["a red circle left of a blue square"], padding="max_length", return_tensors="pt").input_ids
    states = CLIPTextModel.from_pretrained(text_encoder).eval()(ids).last_hidden_state[0]
    weights = UNet2DConditionModel.from_pretrained(unet).state_dict()
    read = [value for name, value in weights.items() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    return torch.cat([states @ weight.T for weight in read], dim=1)


@pytest.mark.slow
def test_the_recipe_runs_from_nothing(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    stage(tmp_path, "pool", "--chunks", "0-0")
    for name in ("vae", "text", "latents", "unet", "pack"):
        stage(tmp_path, name)
    assert "goes on at step" in stage(tmp_path, "unet")  # and is done at once
    train(tmp_path, "probe", "probe")
    for part in ("tune_reading", "tune_first", "tune_preference", "tune"):
        train(tmp_path, "tune", part)
    stage(tmp_path, "pack")
    package = tmp_path / "src/dpt_t2i/bundled"
    with safe_open(package / "base/dpt/tuned/pytorch_lora_weights.safetensors", "pt") as file:
        assert "runs/" not in file.metadata()["dpt"]  # no folder of its maker
    pipeline = StableDiffusionPipeline.from_pretrained(package / "base", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert plain.size == (64, 64)
    model = dpt_t2i.load(str(package / "base"))
    assert model.generate(["a red circle"], seeds=[0], steps=2)[0].size == (64, 64)
    # A change of text encoder: the denoiser is made ready for it and goes on.
    roll_channels(tmp_path / "runs/bundled/base/text_encoder")
    stage(tmp_path, "rebase")
    old, new = (
        read_by(tmp_path / unet, tmp_path / encoder)
        for unet, encoder in (
            (package / "base/unet", package / "base/text_encoder"),
            ("runs/bundled/rebased", "runs/bundled/base/text_encoder"),
        )
    )
    assert (new - old).norm() < 0.02 * old.norm()  # the weights themselves need not agree where no state points
    (tmp_path / "runs/bundled/unet.pt").unlink()
    assert "3 steps" in stage(tmp_path, "unet", "--weights", "runs/bundled/rebased")
    # The package's text encoder learns to say more, where the package's denoiser does not look.
    stage(tmp_path, "tell", "--steps", "2", "--batch", "16")
    unet, told = package / "base/unet", tmp_path / "runs/bundled/base/text_encoder"
    before, after = (read_by(unet, encoder) for encoder in (package / "base/text_encoder", told))
    assert 0 < (after - before).norm() < 0.1 * before.norm()
