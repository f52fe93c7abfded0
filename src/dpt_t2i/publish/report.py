"""The report: one HTML file that needs nothing else, made of JSON and PNG files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from dpt_t2i.files import write_text
from dpt_t2i.publish.figures import accuracy_bars, difference_plot, pair_name, training_curves
from dpt_t2i.publish.gallery import ArmFolder, Line, line_of, read_rows

TEMPLATES = Path(__file__).with_name("templates")
SHOWN = 3  # prompts a category in the image grid
SHOWN_WORSE = 24  # prompts that got worse
ARM_MEANING = {
    "base": "the plain model",
    "base_correct": "the plain model, self-corrected with the probe's adapter",
    "base_correct_best4": "base_correct, the best of four seeds by the probe's matching score",
    "base_correct_random": "base_correct, one of the same four seeds at random (expected value)",
    "control": "LoRA trained on the denoising loss alone, for as many steps as dpt",
    "control_compute": "LoRA trained on the denoising loss alone, with as much compute as dpt",
    "dpt": "LoRA tuned on matching, grounding and denoising",
    "dpt_correct": "dpt, self-corrected while sampling",
    "dpt_best4": "dpt, the best of four seeds by its own matching score",
    "random": "dpt, one of the same four seeds at random (expected value)",
    "dpt_correct_best4": "dpt_correct, the best of four seeds by the same score",
    "dpt_correct_random": "dpt_correct, one of the same four seeds at random (expected value)",
    "judge_correct": "the plain model, self-corrected with the score of dpt, whose LoRA draws nothing",
    "judge_best4": "judge_correct, the best of four seeds by the same score",
    "judge_random": "judge_correct, one of the same four seeds at random (expected value)",
    "dpt_onpolicy": "dpt with its own samples as hard negatives",
    "live": "LoRA tuned just now, on this machine",
    "live_correct": "live, self-corrected while sampling with the live adapter",
}


def write_report(
    path: Path,
    alignment: Mapping[str, Any],
    arms_folder: Path,
    metrics: Mapping[str, Path] | None = None,
    probe: Mapping[str, Any] | None = None,
    title: str = "Do the images obey their prompts?",
    notes: Sequence[str] = (),
) -> Path:
    """Write a self-contained HTML page. Equal inputs give equal bytes.

    Args:
        alignment: content of `alignment.json`.
        arms_folder: `arms/` of the same evaluation; arms without a folder have numbers but no images.
        metrics: name of a run -> its `metrics.jsonl`.
        probe: contents of `itm.json` and `rec.json` under `itm` and `rec`; either may be missing.
        notes: paragraphs under the title.
    """
    arms = {name: ArmFolder.read(arms_folder / name) for name in alignment["arms"]}
    pictured = {name: arm for name, arm in arms.items() if arm.verdicts}
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            notes=[*([notes] if isinstance(notes, str) else notes), *alignment.get("warnings", ())],
            alignment=alignment,
            columns=["overall", *alignment["categories"], "extra_objects"],
            best=best_arms(alignment),
            meaning=ARM_MEANING,
            sentences=[sentence(pair, d) for pair, d in alignment["differences"].items()],
            by_category=_by_category(alignment),
            difference_plot=as_markup(difference_plot(alignment)) if alignment["differences"] else None,
            bars=as_markup(accuracy_bars(alignment)),
            curves=_curves(metrics or {}),
            itm=(probe or {}).get("itm"),
            rec=(probe or {}).get("rec"),
            grid=_grid(pictured, alignment["seeds"]),
            pictured=list(pictured),
            worse=_worse(pictured, alignment),
            settings=json.dumps(alignment.get("settings", {}), indent=2),
        )
    )
    return write_page(path, page)


def environment() -> Environment:
    """Where the pages' templates lie; what is not markup is escaped."""
    return Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write_page(path: Path, page: str) -> Path:
    """In one move, folders made as needed."""
    write_text(path, page)
    return path


def as_markup(text: str) -> Markup:
    """One of our own figures: nothing in them comes from a user unescaped."""
    return Markup(text)


def best_arms(alignment: Mapping[str, Any]) -> dict[str, set[str]]:
    """Column -> the arms with the best number (fewest extra objects, else the highest); none where all are equal."""
    best = {}
    for column in ("overall", *alignment["categories"], "extra_objects"):
        values = {name: numbers[column] for name, numbers in alignment["arms"].items()}
        wanted = min(values.values()) if column == "extra_objects" else max(values.values())
        winners = {name for name, value in values.items() if value == wanted}
        best[column] = winners if len(winners) < len(values) else set()
    return best


def sentence(pair: str, difference: Mapping[str, float]) -> str:
    """A difference and its interval in words."""
    first, second = pair.split("-")
    points, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    interval = f"95 % interval {_signed(low)} to {_signed(high)}"
    if low > 0:
        return f"{first} beats {second} by {points:.1f} points ({interval})."
    if high < 0:
        return f"{first} loses to {second} by {-points:.1f} points ({interval})."
    return f"No clear difference between {first} and {second}: {_signed(points)} points ({interval})."


def _by_category(alignment: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, float]]]]:
    """A pair's name and its differences in every category and in extra objects; results of older versions have none."""
    return [
        (pair_name(pair), [*(d["categories"][name] for name in alignment["categories"]), d["extra_objects"]])
        for pair, d in alignment["differences"].items()
        if "categories" in d
    ]


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\u2212")


def _curves(metrics: Mapping[str, Path]) -> list[tuple[str, Markup]]:
    drawn = {name: training_curves(name, read_rows(path)) for name, path in metrics.items()}
    return [(name, as_markup(svg)) for name, svg in drawn.items() if svg is not None]


def _grid(arms: Mapping[str, ArmFolder], seeds: Sequence[int]) -> list[Line]:
    """The first prompts of each category that any arm has an image of, with the first seed."""
    shown: dict[str, dict[int, None]] = {}
    for arm in arms.values():
        for index, row in sorted((index, row) for (index, seed), row in arm.verdicts.items() if seed == seeds[0]):
            shown.setdefault(row["category"], {})[index] = None
    indices = [index for chosen in shown.values() for index in list(chosen)[:SHOWN]]
    return [line for index in indices if (line := line_of(arms, index, seeds[0])) is not None]


def _worse(arms: Mapping[str, ArmFolder], alignment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each pair of arms how many prompts got better and worse, and for the first pair the latter's images."""
    told: list[dict[str, Any]] = []
    for pair, broken in alignment["broken"].items():
        first, second = pair.split("-")
        both = {name: arms[name] for name in (second, first) if name in arms}
        lines = [line_of(both, row["prompt_index"], seed) for row in broken[:SHOWN_WORSE] for seed in row["seeds"]]
        fixed = len(alignment["fixed"][pair])
        told.append(
            {
                "first": first,
                "second": second,
                "fixed": fixed,
                "broken": len(broken),
                "arms": list(both),
                "lines": [line for line in lines if line is not None] if not told else [],
            }
        )
    return told
