"""Two processes that talk through gloo do what one does, and decide alike."""

import json
import math
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from dpt_t2i.data.examples import Batch
from dpt_t2i.errors import InputError, Stopped
from dpt_t2i.training import engine, trackers, tune
from dpt_t2i.training.checkpoint import checkpoints
from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.encode import Encoded, Encoder
from dpt_t2i.training.engine import train
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.setup import Setup, set_up
from dpt_t2i.training.step import take_step
from dpt_t2i.training.trackers import read_metrics
from dpt_t2i.training.tune import run_tune
from tests.data import writers
from tests.training import forked
from tests.training.test_engine import Coded, Plane, job

STEPS, RATE = 20, 1e-3
ARMS: dict[str, tuple[int, dict[str, int]]] = {  # the same 8 examples a step: processes, settings
    "one": (1, {"train_batch_size": 8, "gradient_accumulation_steps": 1}),
    "two": (2, {"train_batch_size": 4, "gradient_accumulation_steps": 1}),
    "accumulated": (1, {"train_batch_size": 4, "gradient_accumulation_steps": 2}),
}


def in_double_precision(config: Any) -> Setup:
    """The recipe's own set-up with every weight in float64; its casts to float32 are told to do the same."""
    setup = set_up(config)
    pipeline = setup.backbone.pipeline
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, setup.adapter):
        module.double()
    return setup


def exact_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LOG_EVERY", 1)
    monkeypatch.setattr(trackers, "_short", float)


def train_rows(folder: Path) -> list[dict[str, float]]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "train"]
    return [{key: row[key] for key in row if key not in ("split", "images_per_s")} for row in rows]


@pytest.mark.slow
def test_the_same_training_on_one_process_two_and_with_accumulation(
    probe_config, tune_config, tmp_path, monkeypatch
) -> None:
    run_probe(probe_config(max_train_steps=1))
    exact_figures(monkeypatch)

    def tuned(name: str, precision: str, steps: int) -> None:
        if precision == "float64":  # in a fork that ends soon
            torch.set_default_dtype(torch.float64)
            torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
            tune.set_up = in_double_precision  # type: ignore[assignment]
        common = ARMS[name][1] | {
            "adapter": str(tmp_path / "probe"),
            "checkpointing_steps": 99,
            "val_samples": 2,
            "learning_rate": RATE,
            "denoise_itm_coef": 1.0,
            "denoise_dpo_coef": 1.0,
        }
        run_tune(tune_config(output_dir=str(tmp_path / name / precision), **common, max_train_steps=steps))

    for name, (world, _) in ARMS.items():
        for precision, steps in (("float32", 1), ("float64", STEPS)):
            work = partial(tuned, name, precision, steps)
            forked.run(work, tmp_path / "logs" / f"{name}-{precision}", world)

    (first,) = train_rows(tmp_path / "one" / "float32")
    rows = train_rows(tmp_path / "one" / "float64")
    assert len(rows) == STEPS and {"loss_giou", "loss_mse", "grad_norm", "lr"} <= rows[0].keys()
    assert {"loss_denoise_itm", "loss_denoise_dpo"} <= rows[0].keys()
    # cosine: 0 after the last step, wherever it runs
    assert rows[-1]["lr"] == pytest.approx(RATE * (1 + math.cos(math.pi * (STEPS - 1) / STEPS)) / 2)
    weights = all_weights(tmp_path / "one" / "float64")
    assert all(value.dtype == torch.float64 for value in weights.values())
    for other in ("two", "accumulated"):
        assert train_rows(tmp_path / other / "float32") == [pytest.approx(first, rel=1e-5)]
        got = train_rows(tmp_path / other / "float64")
        assert got == [pytest.approx(row, rel=1e-9) for row in rows], other
        far = {
            # What has no gradient but rounding (queries and keys over a single place) is measured against the rate.
            name: float((value - weights[name]).abs().max() / weights[name].abs().max().clamp_min(RATE))
            for name, value in all_weights(tmp_path / other / "float64").items()
        }
        assert far.keys() == weights.keys() and max(far.values()) <= 1e-9, (other, max(far, key=lambda name: far[name]))


def all_weights(folder: Path) -> dict[str, Tensor]:
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    return lora | load_file(folder / "adapter" / "model.safetensors")


def test_two_processes_stream_every_record_once(probe_config, tmp_path: Path) -> None:
    scenes = writers.scenes(18)
    shards = writers.write_shards(scenes, tmp_path / "shards", shards=9)  # the last is held out: scenes 8 and 17
    data = {"dataset": str(shards), "data_format": "webdataset", "streaming": True, "max_samples": None}
    config = probe_config(**data, max_train_steps=4)  # 4 steps x 2 examples x 2 processes

    def body() -> None:
        seen: list[str] = []

        def noting(self: Encoder, batch: Batch) -> Encoded:
            seen.extend(batch.captions)
            return encode(self, batch)

        encode, Encoder.__call__ = Encoder.__call__, noting  # type: ignore[method-assign]
        run_probe(config)
        (tmp_path / f"seen-{os.environ['RANK']}").write_text("\n".join(seen))

    forked.run(body, tmp_path / "logs", world=2)
    first, second = ((tmp_path / f"seen-{rank}").read_text().splitlines() for rank in (0, 1))
    assert len(first) == len(second) == 8
    assert sorted(first + second) == sorted(scene.captions[0] for i, scene in enumerate(scenes) if i % 9 != 8)


@pytest.mark.slow
def test_the_control_on_two_processes_with_a_cut(tune_config, tmp_path: Path) -> None:
    """Behind the cut the LoRA gets no gradient from the denoising loss, on any process: none may wait for it."""
    few = {"max_train_steps": 2, "gradient_accumulation_steps": 2, "objective": "denoise_only"}
    config = tune_config(**few, detach_unet_feature="up1", adapter="none", output_dir=str(tmp_path / "run"))
    forked.run(lambda: run_tune(config), tmp_path / "logs", world=2)
    assert load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")


class Troubled(Plane):
    """On the second process alone, the second step has a NaN and the third brings a signal."""

    def forward(self, batch: Coded, draw: Draw, num_boxes: float) -> dict[str, Tensor]:
        (term,) = super().forward(batch, draw, num_boxes).values()
        second = os.environ.get("RANK") == "1"
        if second and len(self.seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss_mse": term * (math.nan if second and len(self.seen) == 2 else 1.0)}


def test_what_one_process_meets_all_obey(tmp_path: Path) -> None:
    def skipping() -> None:
        given = job(tmp_path / "skip", Troubled(), on_nan="skip", max_train_steps=9)
        slow = replace(given, save_artifacts=lambda folder: (time.sleep(0.5), given.save_artifacts(folder)))
        with pytest.raises(Stopped, match="SIGTERM: stopped at step 3 of 9"):
            train(slow, Accelerator(cpu=True))
        # A launcher ends all when the first of them is gone.
        assert [step for step, _ in checkpoints(tmp_path / "skip")] == [3], "on each process"
        assert given.objective.w.tolist() == pytest.approx([-0.2, 0.2], abs=1e-5)  # type: ignore[union-attr, operator]

    def stopping() -> None:
        accelerator = Accelerator(cpu=True)
        with pytest.raises(InputError) as error:
            train(job(tmp_path / "stop", Troubled(), max_train_steps=9), accelerator)
        (tmp_path / f"said-{accelerator.process_index}").write_text(str(error.value))

    forked.run(lambda: (skipping(), stopping()), tmp_path / "logs", world=2)
    assert [step for step, _ in checkpoints(tmp_path / "skip")] == [3]
    state = json.loads((tmp_path / "skip" / "checkpoint-3" / "state.json").read_text())
    assert (state["step"], state["skipped"], state["examples_a_step"]) == (3, 1, 4)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert all("step 2: the loss is not finite, records [" in text and "{'loss_mse': nan" in text for text in said)
    assert [path.name for path in (tmp_path / "stop" / "nan").iterdir()] == ["step-2-rank-1.safetensors"]


def test_two_processes_share_the_boxes_of_a_step(tmp_path: Path) -> None:
    def body() -> None:
        accelerator = Accelerator(cpu=True)
        rank, model = accelerator.process_index, Plane()
        window: Any = [(Coded((i,), boxes=boxes, slope=(1.0, 0.0)), None) for i, boxes in enumerate(BOXES[rank])]
        given = replace(job(tmp_path, model), weights={"loss_mse": 1.0})
        take_step(given, accelerator, model, torch.optim.SGD(model.parameters(), lr=1.0), window, 0)
        # 12 boxes over 2 processes x 2 micro-batches
        assert [boxes for _, _, boxes in model.seen] == [3.0, 3.0]

    forked.run(body, tmp_path / "logs", world=2)


def test_processes_that_found_different_checkpoints_are_stopped(tmp_path: Path) -> None:
    """Nodes may have disks of their own, with different ones: gradients are shared, weights are not, nobody sees it."""

    def body() -> None:
        accelerator = Accelerator(cpu=True)
        folder = tmp_path / str(accelerator.process_index)
        given = job(folder, max_train_steps=9, resume_from_checkpoint="latest")
        with pytest.raises(InputError, match=r"different checkpoints \(steps 3, 2\): .* one folder that all machines"):
            train(given, accelerator)

    for rank, steps in enumerate((3, 2)):
        done = partial(train, job(tmp_path / str(rank), max_train_steps=steps, train_batch_size=4))
        forked.run(lambda done=done: done(Accelerator(cpu=True)), tmp_path / "logs")  # type: ignore[misc]
    forked.run(body, tmp_path / "logs", world=2)


BOXES = ((1, 0), (4, 7))
