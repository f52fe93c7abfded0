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
from accelerate.utils import broadcast_object_list

from dpt_t2i.errors import InputError
from dpt_t2i.files import write_text

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


def start_trackers(accelerator: Accelerator, run_name: str, settings: Mapping[str, Any]) -> None:
    """Open the trackers; one that cannot start (not logged in, no network) is left with a warning.

    Args:
        settings: dotted key -> value of the run's config, shown beside its curves.
    """
    plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
    named = {"wandb": {"name": run_name}, "trackio": {"name": run_name}} if run_name else {}
    try:
        accelerator.init_trackers(PROJECT, config=plain, init_kwargs=named)
    except Exception as error:  # each tracker raises kinds of its own
        log.warning("report_to: the tracker does not start (%s); figures go to %s alone", error, METRICS)
        accelerator.trackers = []


def close_trackers(accelerator: Accelerator) -> None:
    """Let the trackers write what they still hold, where a run ends before its time."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # as above; why the run ends matters more
            log.warning("report_to: the tracker does not close (%s)", error)


class Metrics:
    """Appends rows `step split ...` on the main process; a resumed run drops rows past the step it goes on from.

    `held_out`: the figures of each validated step; `sampled`: the steps with samples. All processes know both.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, first_step: int) -> None:
        self.path, self.accelerator = folder / METRICS, accelerator
        kept: list[list[dict[str, Any]]] = [[]]
        if accelerator.is_main_process:
            kept = [[row for row in read_metrics(self.path) if row["step"] <= first_step] if first_step else []]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept[0]))
        broadcast_object_list(kept)
        self.held_out = {row["step"]: _figures(row) for row in kept[0] if row["split"] == "val"}
        self.sampled = {row["step"] for row in kept[0] if row["split"] == "samples"}

    def write(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        row = {"step": step, "split": split} | {key: _short(value) for key, value in figures.items()}
        if split == "val":
            self.held_out[step] = _figures(row)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        try:
            self.accelerator.log({f"{split}/{key}": value for key, value in figures.items()}, step=step)
        except Exception as error:  # a service that went away, a full disk: each tracker raises kinds of its own
            log.warning("report_to: the tracker fails (%s); from here on figures go to %s alone", error, METRICS)
            self.accelerator.trackers = []

    def best(self, metric: str | None) -> int | None:
        """The trained step whose held-out `metric` is best, the first of equals; None without one.

        Args:
            metric: of a loss the lowest is best, of all else the highest; None = `itm_text`, else `loss_mse`.

        Raises:
            InputError: validation gives no such figure.
        """
        return best_step(self.held_out, metric)


def best_step(held_out: Mapping[int, Mapping[str, float]], metric: str | None) -> int | None:
    """`Metrics.best` of figures by step."""
    known = {name for figures in held_out.values() for name in figures}
    if metric is None:
        metric = next((name for name in ("itm_text", "loss_mse") if name in known), None)
    elif held_out and metric not in known:
        raise InputError(
            f"best_metric `{metric}` is no held-out figure of this run; there are {', '.join(sorted(known))}"
        )
    if metric is None:
        return None
    sign = -1.0 if metric.startswith("loss") else 1.0
    merits = {
        step: sign * row[metric]
        for step, row in held_out.items()
        if step > 0 and math.isfinite(row.get(metric, math.nan))
    }
    return max(merits, key=lambda step: (merits[step], -step)) if merits else None


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


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in ("step", "split")}


def _short(value: float) -> float:
    return float(f"{value:.6g}") if math.isfinite(value) else value
