"""Killed at any moment, a run goes on as if nothing had been: the same weights, state and figures, bit for bit."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpt_t2i.config import TuneConfig
from dpt_t2i.training import checkpoint
from dpt_t2i.training.checkpoint import checkpoints, find_checkpoint
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.tune import run_tune
from tests.training import forked

pytestmark = pytest.mark.slow
STEPS = 10
SETTINGS: dict[str, Any] = {
    "max_train_steps": STEPS,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 1,
    "validation_steps": 5,
    "val_samples": 2,
    "dropout": 0.1,
    "caption_dropout": 0.5,
    "lr_warmup_steps": 3,
    "ema_decay": 0.9,
    "random_flip": True,
    "on_policy_fraction": 0.5,
    "on_policy_every": 5,
    "on_policy_pool": 2,
    "on_policy_steps": 1,
}


def state_of(run: Path) -> dict[str, Any]:
    """Everything that a run leaves but what tells its speed or its folder."""
    last = run / f"checkpoint-{STEPS}"
    weights = {
        str(path.relative_to(run)): _tensor_bytes(path)
        for folder in (last, run / "adapter", run / "ema")
        for path in sorted(folder.rglob("*.safetensors"))
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("images_per_s", None)
    state = json.loads((last / "state.json").read_text())
    del state["files"]  # sizes: headers hold the folder's name
    return weights | {"metrics": rows, "state": state, "kept": [step for step, _ in checkpoints(run)]}


def _tensor_bytes(path: Path) -> bytes:
    """A safetensors file without its header, which holds the config and so the run's folder."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def kill_in_a_while(config: TuneConfig, log: Path, seconds: float) -> None:
    """SIGKILL, counted from the moment that the run has made its first step."""
    before = [step for step, _ in checkpoints(config.folder)]
    process = forked.start(lambda: run_tune(config), log)
    while [step for step, _ in checkpoints(config.folder)] == before and process.is_alive():
        time.sleep(0.005)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]


def kill_while_writing(config: TuneConfig, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL when half of the optimiser's state is in the file."""

    def half(tensors: Any, path: Path) -> None:
        real(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    real = checkpoint.save_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", half)
        process = forked.start(lambda: run_tune(config), log)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
    assert list(config.folder.glob(".checkpoint-*.partial")), "it was in the middle of it"


def test_three_kills_change_nothing(probe_config, tune_config, tmp_path, monkeypatch):
    run_probe(probe_config(max_train_steps=1))
    common = SETTINGS | {"adapter": str(tmp_path / "probe")}
    straight = tune_config(output_dir=str(tmp_path / "straight"), **common)
    run_tune(straight)

    killed: Callable[..., TuneConfig] = lambda **more: tune_config(  # noqa: E731
        output_dir=str(tmp_path / "killed"), **common, **more
    )
    log = tmp_path / "log"
    kill_in_a_while(killed(), log, random.random() * 0.3)
    kill_in_a_while(killed(resume_from_checkpoint="latest"), log, random.random() * 0.3)
    kill_while_writing(killed(resume_from_checkpoint="latest"), log, monkeypatch)
    latest = find_checkpoint(tmp_path / "killed", "latest")
    assert latest is not None and 2 <= int(latest.name.rpartition("-")[2]) < STEPS
    run_tune(killed(resume_from_checkpoint="latest"))

    want, got = state_of(straight.output_dir), state_of(tmp_path / "killed")
    assert want.keys() == got.keys() and len([name for name in want if name.endswith(".safetensors")]) >= 6
    assert [name for name in want if name.endswith("on_policy.safetensors")], "the pool of own samples too"
    assert [name for name in want if want[name] != got[name]] == []
    assert not list((tmp_path / "killed").glob(".checkpoint-*"))
