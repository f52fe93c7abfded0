"""`dpt runs compare A B`: what was set differently, what came of it, and both runs' curves in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from dpt_t2i.errors import InputError
from dpt_t2i.files import in_one_move
from dpt_t2i.training.trackers import METRICS, best_step, read_metrics

CONFIG = "config.yaml"
FOLDER_KEYS = ("output_dir", "run_name")  # differ in any two runs
HIDDEN = ("step", "split", "grad_norm", "images_per_s", "skipped")  # in the table's last lines, not among the curves
COLUMNS = 3

Row = Mapping[str, Any]


def compare_runs(a: Path, b: Path, output: Path) -> dict[str, Any]:
    """Compare two run folders and draw `output`.

    Returns:
        `settings` that differ, key -> [a's, b's]; `figures`, name -> [a's, b's]: held-out ones at the last and at the
        best step, training ones at the last step that both have; `plot`; `summary`, the table.

    Raises:
        InputError: a folder that holds no metrics.
    """
    rows = [_rows(folder) for folder in (a, b)]
    if output.suffix.lower().removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        raise InputError(f"--output {output}: no picture format is called `{output.suffix}`; give a .png")
    settings = _differences(*(_settings(folder) for folder in (a, b)))
    asked = [_settings(folder).get("train.best_metric") for folder in (a, b)]
    figures = _figures(rows, asked)
    plot(rows, [_name(a, b), _name(b, a)], output)
    summary = ["settings that differ:", *_table(settings, a, b)] if settings else ["the same settings"]
    summary += ["", "figures:", *_table(figures, a, b), f"plot: {output}"]
    return {"settings": settings, "figures": figures, "plot": str(output), "summary": summary}


def plot(rows: Sequence[Sequence[Row]], names: Sequence[str], output: Path) -> None:
    """A panel a figure, training and held-out apart, a line a run."""
    panels = [
        (split, key)
        for split in ("train", "val", "samples")
        for key in dict.fromkeys(key for run in rows for row in run if row["split"] == split for key in row)
        if key not in HIDDEN
    ]
    height = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(4 * COLUMNS, 2.6 * height), layout="constrained")
    axes = list(figure.subplots(height, COLUMNS, squeeze=False).flat)
    for axis, (split, key) in zip(axes, panels, strict=False):
        for run, name, color in zip(rows, names, ("C0", "C1"), strict=True):
            points = [(row["step"], row[key]) for row in run if row["split"] == split and key in row]
            if points:
                marker = "o" if len(points) < 20 else ""
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=name, color=color)
        axis.set_title(f"{split}: {key}", fontsize=10)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=2)
    output.parent.mkdir(parents=True, exist_ok=True)
    with in_one_move(output) as unfinished:
        figure.savefig(unfinished, dpi=100, format=output.suffix[1:] or "png")


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / METRICS)
    if not rows:
        raise InputError(f"{folder} is no run folder: {folder / METRICS} is missing or empty")
    return rows


def _settings(folder: Path) -> dict[str, Any]:
    """Dotted key -> value of the run's `config.yaml`; {} where it is gone."""
    file = folder / CONFIG
    if not file.is_file():
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file} holds no settings; it must be a table of sections")
    sections = {
        f"{section}.{key}": value
        for section, leaves in tree.items()
        if isinstance(leaves, dict)
        for key, value in leaves.items()
    }
    return sections | {key: value for key, value in tree.items() if not isinstance(value, dict)}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = [key for key in {**one, **other} if key not in FOLDER_KEYS]
    return {key: [one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)}


def _figures(rows: Sequence[Sequence[Row]], best_metrics: Sequence[str | None]) -> dict[str, list[Any]]:
    held_out = [{row["step"]: row for row in run if row["split"] == "val"} for run in rows]
    trained = [{row["step"]: row for row in run if row["split"] == "train"} for run in rows]
    table = {"last step": [max(row["step"] for row in run) for run in rows]}
    common = max(set(trained[0]) & set(trained[1]), default=None)
    if common is not None:
        table |= _pairs([run[common] for run in trained], f"train, step {common}")
    table |= _pairs([run[max(run)] if run else {} for run in held_out], "val, last")
    best = [best_step(run, metric) for run, metric in zip(held_out, best_metrics, strict=True)]
    table["best step"] = best
    table |= _pairs(
        [{} if step is None else run[step] for run, step in zip(held_out, best, strict=True)], "val, best step"
    )
    return table


def _pairs(rows: Sequence[Row], where: str) -> dict[str, list[Any]]:
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("step", "split")]
    return {f"{where}: {key}": [row.get(key) for row in rows] for key in keys}


def _table(pairs: Mapping[str, Sequence[Any]], a: Path, b: Path) -> list[str]:
    lines = [("", _name(a, b), _name(b, a)), *((key, *map(_text, values)) for key, values in pairs.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return [f"  {line[0]:{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}" for line in lines]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _name(folder: Path, other: Path) -> str:
    """The folder's own name, or all of its path where both are called alike."""
    return folder.name if folder.name and folder.name != other.name else str(folder)
