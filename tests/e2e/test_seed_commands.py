"""The three command lines of the paper's project page: each flag means here what it says there."""

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpt_t2i import cli
from tests.e2e.launching import TINY, dpt, files_of, launch
from tests.tiny import tiny_pipeline

STAGE1 = r"""
accelerate launch --mixed_precision="fp16" --multi_gpu --main_process_port=255487 train_stage1.py \
    --pretrained_model_name_or_path=$MODEL_NAME \
    --enable_xformers_memory_efficient_attention \
    --gradient_checkpointing \
    --unet_feature='up1' \
    --dataloader_num_workers=4 \
    --center_crop --random_flip \
    --lr_scheduler="constant"  \
    --checkpointing_steps=500 \
    --train_batch_size=48 \
    --val_batch_size=16 \
    --gradient_accumulation_steps=1 \
    --max_train_steps=60000 \
    --learning_rate=1e-4  \
    --run_name='dpt_stage1' \
    --report_to=wandb
"""
STAGE2 = r"""
accelerate launch --mixed_precision="fp16" --multi_gpu --main_process_port=25548 train_stage2.py \
    --pretrained_model_name_or_path=$MODEL_NAME \
    --enable_xformers_memory_efficient_attention \
    --gradient_checkpointing \
    --unet_feature='up1' \
    --lora_rank=4 \
    --mse_loss_coef=1 \
    --dataloader_num_workers=8 \
    --center_crop --random_flip \
    --lr_scheduler="cosine"  \
    --checkpointing_steps=200 \
    --train_batch_size=8 \
    --val_batch_size=16 \
    --gradient_accumulation_steps=8 \
    --max_train_steps=5000 \
    --learning_rate=1e-4 \
    --qformer_ckpt $CKPT_STAGE1 \
    --run_name='dpt_stage2' \
    --report_to=wandb
"""
TEXT_TO_IMAGE = 'python txt2img.py --gpuid 0 --prompt "a painting of a virus monster playing guitar"'


def flags(line: str, **variables: str) -> list[str]:
    """What follows the script's name, as a shell would hand it over."""
    for name, value in variables.items():
        line = line.replace(f"${name}", value)
    words = shlex.split(line.replace("\\\n", " "))
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return words[script + 1 :]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def parsed(monkeypatch: pytest.MonkeyPatch, target: str, *arguments: str) -> Any:
    """The config that a command line becomes, the work itself replaced."""
    module, _, function = target.partition(":")
    seen: list[Any] = []
    stub = ModuleType(module)
    setattr(stub, function, lambda config: seen.append(config) or {})
    monkeypatch.setitem(sys.modules, module, stub)
    assert cli.main(list(arguments)) == 0
    return seen[0]


def test_stage_one_reads_each_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    line = flags(STAGE1, MODEL_NAME="CompVis/stable-diffusion-v1-4")
    config = parsed(monkeypatch, "dpt_t2i.report:probe", "probe", *line)
    assert config.model.pretrained_model_name_or_path == "CompVis/stable-diffusion-v1-4"
    assert (config.model.tap, config.model.adapter) == ("up1", "none")
    assert config.data.center_crop and config.data.random_flip and config.data.dataloader_num_workers == 4
    train = config.train
    assert train.gradient_checkpointing and train.enable_xformers_memory_efficient_attention
    assert (train.lr_scheduler, train.checkpointing_steps, train.report_to) == ("constant", 500, "wandb")
    assert (train.train_batch_size, train.val_batch_size, train.gradient_accumulation_steps) == (48, 16, 1)
    assert (train.max_train_steps, train.learning_rate) == (60_000, 1e-4)
    assert train.mixed_precision is None, "what the launcher was told holds"
    assert config.folder == Path("runs/probe/dpt_stage1")


def test_stage_two_reads_each_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    line = flags(STAGE2, MODEL_NAME="CompVis/stable-diffusion-v1-4", CKPT_STAGE1="logs/dpt_stage1/checkpoint-60000")
    config = parsed(monkeypatch, "dpt_t2i.report:tune", "tune", *line)
    assert (config.model.tap, config.model.adapter) == ("up1", "logs/dpt_stage1/checkpoint-60000")
    assert (config.lora.rank, config.denoise.mse_loss_coef) == (4, 1.0)
    assert config.data.center_crop and config.data.random_flip and config.data.dataloader_num_workers == 8
    train = config.train
    assert train.gradient_checkpointing and train.enable_xformers_memory_efficient_attention
    assert (train.lr_scheduler, train.checkpointing_steps, train.report_to) == ("cosine", 200, "wandb")
    assert (train.train_batch_size, train.val_batch_size, train.gradient_accumulation_steps) == (8, 16, 8)
    assert (train.max_train_steps, train.learning_rate) == (5_000, 1e-4)
    assert config.folder == Path("runs/tune/dpt_stage2")


def test_text_to_image_reads_each_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = parsed(monkeypatch, "dpt_t2i.sampling.commands:run_generate", "generate", *flags(TEXT_TO_IMAGE))
    assert config.model.device == "0"
    assert config.prompt == ("a painting of a virus monster playing guitar",)


def test_stage_one_runs_under_the_launcher(base: str, tmp_path: Path) -> None:
    """The line as it stands, then only what makes it short: no flag of it is left out."""
    short = ["--max_train_steps=1", "--train_batch_size=4", "--val_samples=4", "--output_dir", str(tmp_path)]
    done = launch("probe", *flags(STAGE1, MODEL_NAME=base), *TINY, *short, processes=1)
    run = tmp_path / "dpt_stage1"
    assert f"output: {run}" in done.stdout
    assert "xformers is not used" in done.stderr
    assert {"adapter/model.safetensors", "config.yaml", "metrics.jsonl"} <= set(files_of(run))
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["random_flip"] is True


@pytest.mark.slow
def test_both_stages_run_on_two_processes(base: str, tmp_path: Path) -> None:
    short = ["--max_train_steps=2", "--train_batch_size=4", "--output_dir", str(tmp_path)]
    launch("probe", *flags(STAGE1, MODEL_NAME=base), *TINY, *short, processes=2)
    stage1 = tmp_path / "dpt_stage1"
    done = launch("tune", *flags(STAGE2, MODEL_NAME=base, CKPT_STAGE1=str(stage1)), *TINY, *short, processes=2)
    stage2 = tmp_path / "dpt_stage2"
    assert done.stdout.count("output: ") == 1, "the first process alone speaks"
    rows = [json.loads(line) for line in (stage2 / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in rows] == [(0, "val"), (2, "train"), (2, "val")]
    assert all(row["loss_mse"] > 0 for row in rows)
    before, after = (load_file(folder / "adapter" / "model.safetensors") for folder in (stage1, stage2))
    assert (after["queries.weight"] - before["queries.weight"]).abs().max() < 1e-3, "it goes on from stage 1"
    lora = load_file(stage2 / "pytorch_lora_weights.safetensors")
    assert {min(value.shape) for value in lora.values()} == {4}
    assert files_of(stage2) == [
        "adapter/config.json",
        "adapter/model.safetensors",
        *(f"checkpoint-2/{name}" for name in ("adapter/config.json", "adapter/model.safetensors")),
        *(f"checkpoint-2/{name}" for name in ("optimizer.safetensors", "pytorch_lora_weights.safetensors")),
        "checkpoint-2/state.json",
        "config.yaml",
        "cut_texts.jsonl",  # the tiny encoder reads 16 tokens
        "metrics.jsonl",
        "pytorch_lora_weights.safetensors",
    ], "nothing of a second process"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what --gpuid 0 does where there is no GPU")
def test_text_to_image_runs_on_the_bundled_model(tmp_path: Path) -> None:
    dpt("generate", *flags(TEXT_TO_IMAGE), "--steps", "2", "--output_dir", tmp_path)
    (row,) = map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())
    assert row["prompt"] == "a painting of a virus monster playing guitar"
