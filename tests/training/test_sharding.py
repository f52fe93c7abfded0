"""FSDP on two gloo processes: the base in parts, and the same training as on one process."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from dpt_t2i.backbones.lora import add_lora, lora_parameters
from dpt_t2i.errors import InputError
from dpt_t2i.training import engine
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.setup import make_accelerator
from dpt_t2i.training.sharding import ShardedBase, _blocks, average_gradients
from dpt_t2i.training.trackers import read_metrics
from dpt_t2i.training.tune import run_tune
from tests.tiny import tiny_backbone
from tests.training import forked

CONFIG = Path(__file__).parents[2] / "configs" / "fsdp.yaml"
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([700, 20])


def launched(**changes: Any) -> dict[str, str]:
    """The environment that `accelerate launch --config_file configs/fsdp.yaml` makes."""
    settings = yaml.safe_load(CONFIG.read_text())["fsdp_config"] | changes
    return {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value).lower() for key, value in settings.items()}


def in_parts(work: Callable[[], object]) -> Callable[[], object]:
    def body() -> None:
        os.environ.update(launched())
        work()

    return body


def test_a_base_in_parts_gives_the_same_maps_predictions_and_gradients(tmp_path: Path) -> None:
    def passes(sharded: bool) -> dict[str, torch.Tensor]:
        backbone = tiny_backbone()
        torch.manual_seed(1)
        for parameter in add_lora(backbone, rank=2):
            torch.nn.init.normal_(parameter, std=0.1)
        text, taps = backbone.encode_text(["a star", "two"]), backbone.parse_taps("up1")
        accelerator = Accelerator(cpu=True)
        count = sum(parameter.numel() for parameter in backbone.denoiser.parameters())
        base = ShardedBase(backbone, accelerator) if sharded else None
        if base is not None:
            held = [
                parameter.to_local() for parameter in backbone.denoiser.parameters() if isinstance(parameter, DTensor)
            ]
            lora = sum(parameter.numel() for parameter in lora_parameters(backbone))
            assert sum(part.numel() for part in held) < 0.6 * (count - lora), "a half, and what does not divide"
            with base.whole():
                if accelerator.is_main_process:  # alone: the other process would have to answer
                    backbone.predict(LATENTS, TIMESTEPS, text)
        early = backbone.features(LATENTS, TIMESTEPS, text, taps).maps["up1"]
        prediction, late = backbone.predict(LATENTS, TIMESTEPS, text, taps)
        share = 1.0 + accelerator.process_index if sharded else 1.5  # 1 and 2 of the two: 1.5 in the mean
        (prediction.square().mean() + share * (early * late.maps["up1"]).mean()).backward()
        if base is not None:
            base.settle()
            average_gradients(lora_parameters(backbone), accelerator)
        gradients = torch.cat([p.grad.flatten() for p in lora_parameters(backbone) if p.grad is not None])
        return {"early": early.detach(), "prediction": prediction.detach(), "gradients": gradients}

    def save(name: str, sharded: bool) -> None:
        torch.save(passes(sharded), tmp_path / f"{name}-{os.environ.get('RANK', '0')}")

    forked.run(partial(save, "one", False), tmp_path / "logs")
    forked.run(in_parts(partial(save, "two", True)), tmp_path / "logs", world=2)
    want, *got = (torch.load(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    for found in got:
        assert torch.equal(found["early"], want["early"])
        torch.testing.assert_close(found["prediction"], want["prediction"])
        torch.testing.assert_close(found["gradients"], want["gradients"])
    assert float(want["gradients"].abs().max()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["probe", "tune"])
def test_the_same_training_in_parts_stopped_and_gone_on_with(probe_config, tune_config, tmp_path, stage) -> None:
    """One process x batch 4 against two x 2 in parts, these in two goes; validation, samples and average included."""
    if stage == "tune":
        forked.run(lambda: run_probe(probe_config(max_train_steps=1)), tmp_path / "logs")
    common = {"max_train_steps": 4, "validation_steps": 2, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}

    def trained(name: str, batch: int, **more: Any) -> None:
        settings = common | {"output_dir": str(tmp_path / name), "train_batch_size": batch} | more
        if stage == "probe":
            run_probe(probe_config(**settings))
            return
        settings |= {
            "adapter": str(tmp_path / "probe"),
            "gradient_checkpointing": True,
            "ema_decay": 0.5,
            "denoise_itm_coef": 1.0,
            "denoise_dpo_coef": 1.0,
        }
        settings |= {"sample_every": 2, "sample_count": 1, "sample_steps": 2, "sample_prompts": ("a star",)}
        run_tune(tune_config(**settings))

    forked.run(partial(trained, "one", 4), tmp_path / "logs")
    for go in ({}, {"resume_from_checkpoint": "checkpoint-2"}):
        forked.run(in_parts(partial(sharded, partial(trained, "two", 2, **go))), tmp_path / "logs", world=2)
    want, got = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in want] == [row["step"] for row in got] and len(want) >= 4
    assert got == [pytest.approx(row, rel=1e-4, abs=1e-6) for row in want]
    files = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) >= (2 if stage == "probe" else 6)
    for file in files:
        mine, theirs = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        assert mine.keys() == theirs.keys(), file
        if not file.endswith("optimizer.safetensors"):
            # AdamW moves each number by about the rate a step: a lost share of a gradient would show as that.
            assert all((mine[name] - theirs[name]).abs().max() < 1e-4 for name in mine), file


@pytest.mark.slow
def test_an_atlas_in_parts_with_shares_of_unlike_size(probe_config, tmp_path: Path) -> None:
    """Three examples one by one: the processes measure two and one."""
    few = {"max_train_steps": 1, "val_samples": 3, "val_batch_size": 1, "taps": "mid_up1", "timestep_buckets": 2}

    def mapped(name: str, batch: int) -> None:
        run_probe(probe_config(**few, train_batch_size=batch, output_dir=str(tmp_path / name)))

    forked.run(partial(mapped, "one", 4), tmp_path / "logs")
    forked.run(in_parts(partial(mapped, "two", 2)), tmp_path / "logs", world=2)
    want, got = (json.loads((tmp_path / name / "atlas.json").read_text())["cells"] for name in ("one", "two"))
    assert got.keys() == want.keys() == {"mid", "up1"}
    for tap, row in want.items():
        for timestep, cell in row.items():
            counted = {name: share["count"] for name, share in cell.items() if isinstance(share, dict)}
            assert counted and counted == {name: got[tap][timestep][name]["count"] for name in counted}


def sharded(work: Callable[[], object]) -> None:
    """In a fork: `work`, in which the engine must have cut the base."""
    made: list[ShardedBase] = []
    engine.ShardedBase = lambda *given: made.append(ShardedBase(*given)) or made[-1]  # type: ignore[assignment, misc]
    work()
    assert len(made) == 1 and len(made[0].units) > 5


def rows_of(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in ("split", "images_per_s")} for row in rows]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fsdp_version": 1, "fsdp_reshard_after_forward": "FULL_SHARD"}, "fsdp_version 1 .* needs fsdp_version 2"),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP", "fsdp_min_num_params": 9}, "set TRANSFORMER_BASED_WRAP"),
        ({"fsdp_auto_wrap_policy": "BY_EYE"}, "fsdp_config: Invalid auto wrap policy"),
        ({"fsdp_cpu_ram_efficient_loading": True}, "leaves the text encoders empty; set it to false"),
        ({"fsdp_activation_checkpointing": True}, "set it to false, and give --gradient_checkpointing"),
    ],
)
def test_settings_that_training_cannot_follow_are_named(monkeypatch, probe_config, changed, said) -> None:
    for key, value in launched(**changed).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=said):
        make_accelerator(probe_config())


def test_what_fsdp_cannot_do_is_refused(monkeypatch, tune_config, tmp_path) -> None:
    for key, value in launched().items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match="detach_unet_feature does not go with FSDP"):
        run_tune(tune_config(objective="denoise_only", detach_unet_feature="up1"))
    with pytest.raises(InputError, match="`Nothing` .* is no block of UNet2DConditionModel; .* BasicTransformerBlock"):
        _blocks(tiny_backbone().denoiser, ["ResnetBlock2D", "Nothing"])
