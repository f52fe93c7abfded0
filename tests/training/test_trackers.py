"""`metrics.jsonl`: what is appended, what a resumed run keeps, what a kill may leave."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpt_t2i.errors import InputError
from dpt_t2i.training import trackers
from dpt_t2i.training.trackers import (
    Metrics,
    best_step,
    close_trackers,
    read_metrics,
    start_trackers,
    usable_tracker,
)


class Recorder:
    """Of accelerate only what Metrics uses."""

    def __init__(self, main: bool = True) -> None:
        self.is_main_process = main
        self.logged: list[tuple[dict[str, float], int]] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder: Path, *steps: int) -> Path:
    metrics = Metrics(folder, Recorder(), 0)
    for step in steps:
        metrics.write(step, "train", {"loss": float(step)})
    return metrics.path


def test_a_row_says_step_split_and_six_digits(tmp_path):
    recorder = Recorder()
    metrics = Metrics(tmp_path / "new" / "run", recorder, 0)
    metrics.write(0, "val", {"itm_text": 0.5})
    metrics.write(10, "train", {"loss": 1.23456789, "lr": 1e-4, "grad_norm": math.inf})
    assert rows(tmp_path / "new" / "run") == [
        {"step": 0, "split": "val", "itm_text": 0.5},
        {"step": 10, "split": "train", "loss": 1.23457, "lr": 0.0001, "grad_norm": math.inf},
    ]
    assert recorder.logged[0] == ({"val/itm_text": 0.5}, 0)
    assert recorder.logged[1] == ({"train/loss": 1.23456789, "train/lr": 1e-4, "train/grad_norm": math.inf}, 10)


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    written(tmp_path, 1, 2)
    Metrics(tmp_path, Recorder(), 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_resumed_run_drops_the_rows_past_its_step(tmp_path):
    written(tmp_path, 10, 20, 30, 40)
    resumed = Metrics(tmp_path, Recorder(), 20)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    resumed.write(30, "train", {"loss": -1.0})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(10, 10.0), (20, 20.0), (30, -1.0)]


def test_a_last_line_cut_by_a_kill_is_dropped(tmp_path):
    path = written(tmp_path, 1, 2, 3)
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    resumed = Metrics(tmp_path, Recorder(), 3)
    resumed.write(4, "train", {})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4], "the file is whole again"


def test_no_file_means_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_only_the_main_process_writes_but_all_log(tmp_path):
    path = written(tmp_path, 1, 2)
    before = path.read_bytes()
    other = Recorder(main=False)
    Metrics(tmp_path, other, 0).write(3, "train", {"loss": 0.0})
    assert path.read_bytes() == before
    assert other.logged == [({"train/loss": 0.0}, 3)]


def test_a_tracker_that_is_not_installed_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    assert usable_tracker("wandb") is None
    assert "wandb is not installed; figures go to metrics.jsonl alone" in caplog.text
    assert usable_tracker("tensorboard") == "tensorboard"
    assert usable_tracker(None) is None


def test_an_unknown_tracker_is_an_error():
    with pytest.raises(InputError, match="report_to `wanbd` is not a tracker; there are all, none, .*wandb"):
        usable_tracker("wanbd")


def test_a_tracker_that_does_not_start_is_a_warning(caplog):
    class Offline(Recorder):
        trackers = ["half made"]

        def init_trackers(self, project, config, init_kwargs):
            assert (project, init_kwargs["wandb"]) == ("dpt-t2i", {"name": "my_run"})
            assert config == {"train.learning_rate": 0.1, "model.lora": "None", "timesteps": "[500, 250]", "on": True}
            raise RuntimeError("no API key")

    accelerator = Offline()
    settings = {"train.learning_rate": 0.1, "model.lora": None, "timesteps": [500, 250], "on": True}
    start_trackers(accelerator, "my_run", settings)
    assert accelerator.trackers == [] and "does not start (no API key)" in caplog.text


def test_a_tracker_that_fails_in_the_middle_ends_no_run(tmp_path, caplog):
    class Gone(Recorder):
        trackers = ["a service"]

        def log(self, values, step):
            if self.trackers:
                raise BrokenPipeError("the service went away")

    accelerator = Gone()
    metrics = Metrics(tmp_path, accelerator, 0)
    for step in (1, 2):
        metrics.write(step, "train", {"loss": 0.5})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2] and accelerator.trackers == []
    assert caplog.text.count("the tracker fails (the service went away); from here on figures go to metrics.jsonl") == 1


def test_every_tracker_is_closed_though_one_fails(caplog):
    closed = []

    class Tracker:
        def __init__(self, fails):
            self.fails = fails

        def finish(self):
            closed.append(self.fails)
            if self.fails:
                raise RuntimeError("offline")

    accelerator = Recorder()
    accelerator.trackers = [Tracker(True), Tracker(False)]
    close_trackers(accelerator)
    assert closed == [True, False] and "does not close (offline)" in caplog.text


def test_a_figure_that_is_not_finite_is_never_the_best():
    assert best_step({500: {"itm_text": math.nan}, 1000: {"itm_text": 0.1}, 1500: {"itm_text": 0.2}}, None) == 1500
    assert best_step({500: {"loss_mse": math.nan}}, None) is None
