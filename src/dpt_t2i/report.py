"""Commands that end with a page to look at or to publish: what `training` and `evaluation` give, shown by `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState

from dpt_t2i.config import AlignmentConfig, ProbeConfig, TuneConfig
from dpt_t2i.evaluation.commands import run_alignment
from dpt_t2i.publish.atlas import write_atlas_picture, write_atlas_report
from dpt_t2i.publish.model_card import check_card_place, write_model_card
from dpt_t2i.publish.report import write_report
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.trackers import METRICS
from dpt_t2i.training.tune import run_tune


def probe(config: ProbeConfig) -> dict[str, Any]:
    """`dpt probe`: stage 1, and the card of its run; of an atlas of taps its drawing instead, `atlas.png` and
    `report.html` beside `atlas.json`."""
    check_card_place(config.folder)
    result = run_probe(config)
    if "atlas" not in result:  # of several processes the first alone reports
        return result if config.atlas.taps else _with_card(result, config.folder)
    folder = config.folder
    picture = write_atlas_picture(folder / "atlas.png", result["atlas"])
    report = write_atlas_report(folder / "report.html", result["atlas"], folder / METRICS)
    lines = [*result["summary"], f"picture: {picture}", f"report: {report}"]
    return result | {"picture": str(picture), "report": str(report), "summary": lines}


def tune(config: TuneConfig) -> dict[str, Any]:
    """`dpt tune`: stage 2, and the card of its run."""
    check_card_place(config.folder)
    return _with_card(run_tune(config), config.folder)


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


def _with_card(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The run's `README.md`, fit to be published with it; of several processes the first writes."""
    if PartialState().is_main_process:
        write_model_card(folder)
    return result


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
