"""Where a run's figures go: `metrics.jsonl` always, and what `report_to` names through accelerate."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dpt_t2i.errors import InputError

METRICS = "metrics.jsonl"
PROJECT = "dpt-t2i"

log = logging.getLogger(__name__)


def usable_tracker(name: str | None) -> str | None:
    """The tracker that `report_to` names; None, with a warning, where its package is not installed.

    A run of days must not fail for a missing dashboard: every figure is in `metrics.jsonl` in any case.

    Raises:
        InputError: there is no such tracker.
    """
    if name is None or name == "all":
        return name
    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise InputError(f"report_to `{name}` is not a tracker; there are all, none, {', '.join(known)}")
    if name not in [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]:
        log.warning("report_to: %s is not installed; figures go to %s alone", name, METRICS)
        return None
    return name


def start_trackers(accelerator: Accelerator, run_name: str) -> None:
    """Open the trackers; one that cannot start (not logged in, no network) is left with a warning."""
    named = {"wandb": {"name": run_name}, "trackio": {"name": run_name}} if run_name else {}
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=named)
    except Exception as error:  # each tracker raises kinds of its own
        log.warning("report_to: the tracker does not start (%s); figures go to %s alone", error, METRICS)
        accelerator.trackers = []


class Metrics:
    """Appends rows `step split ...` on the main process; a resumed run drops rows past the step it goes on from."""

    def __init__(self, folder: Path, accelerator: Accelerator, first_step: int) -> None:
        self.path, self.accelerator = folder / METRICS, accelerator
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read_metrics(self.path) if row["step"] <= first_step] if first_step else []
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def write(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        row = {"step": step, "split": split} | {key: _short(value) for key, value in figures.items()}
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({f"{split}/{key}": value for key, value in figures.items()}, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line that a kill cut short is dropped; [] if there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _short(value: float) -> float:
    return float(f"{value:.6g}") if math.isfinite(value) else value
