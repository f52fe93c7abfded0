"""Commands that end with a page to look at: the numbers of `evaluation`, shown by `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpt_t2i.config import AlignmentConfig, ProbeConfig
from dpt_t2i.evaluation.commands import run_alignment
from dpt_t2i.publish.atlas import write_atlas_picture, write_atlas_report
from dpt_t2i.publish.report import write_report
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.trackers import METRICS


def probe(config: ProbeConfig) -> dict[str, Any]:
    """`dpt probe`: stage 1; an atlas of taps is also drawn, in `atlas.png` and `report.html` beside `atlas.json`."""
    result = run_probe(config)
    if "atlas" not in result:  # of several processes the first alone reports
        return result
    folder = config.folder
    picture = write_atlas_picture(folder / "atlas.png", result["atlas"])
    report = write_atlas_report(folder / "report.html", result["atlas"], folder / METRICS)
    lines = [*result["summary"], f"picture: {picture}", f"report: {report}"]
    return result | {"picture": str(picture), "report": str(report), "summary": lines}


def evaluate_alignment(config: AlignmentConfig) -> dict[str, Any]:
    """`dpt evaluate alignment`: make and judge the arms, then write `report.html` beside `alignment.json`.

    The training curves of a LoRA's own run folder are shown where its `metrics.jsonl` lies.
    """
    result = run_alignment(config)
    if not result["arms"]:  # of several processes the first alone reports
        return result
    folder = config.output_dir
    report = write_report(folder / "report.html", result, folder / "arms", _curves(config))
    return result | {"report": str(report), "summary": [*result["summary"], f"report: {report}"]}


def _curves(config: AlignmentConfig) -> dict[str, Path]:
    """Name of an arm's source -> `metrics.jsonl` of the run that made its LoRA."""
    named = {
        "dpt": config.model.lora,
        "control": config.control_lora,
        "control_compute": config.control_compute_lora,
        "dpt_onpolicy": config.onpolicy_lora,
        "live": config.live_lora,
    }
    found = {}
    for name, lora in named.items():
        if lora is None or str(lora) == "none":
            continue
        run = Path(lora) if Path(lora).is_dir() else Path(lora).parent
        if (run / "metrics.jsonl").is_file():
            found[name] = run / "metrics.jsonl"
    return found
