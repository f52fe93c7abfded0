"""Commands that end with a page to look at: the numbers of `evaluation`, shown by `publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpt_t2i.config import AlignmentConfig
from dpt_t2i.evaluation.commands import run_alignment
from dpt_t2i.publish.report import write_report


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
