"""Do the images obey their prompts? Paired arms over one suite: same prompts, seeds, guidance, steps and sampler.

output_dir/
  alignment.json                 the result
  arms/ARM/                      a generation folder (images/, manifest.jsonl, contact_sheet.png)
  arms/ARM/verdicts.jsonl        the checker's verdict of every image that counts
  arms/ARM/candidates.jsonl      of a search: the verdicts of all candidates
  arms/ARM/boxes.jsonl           the adapter's boxes in the first images of each category
test_log                         one line a run on a test suite: they are for reporting, not for choosing
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image

from dpt_t2i.config import AlignmentConfig
from dpt_t2i.evaluation.arm_images import borrow_images, jobs_of_arm, make_images
from dpt_t2i.evaluation.arms import ARMS, PAIRS, Arm, Recipe, choose_arms, recipe_of
from dpt_t2i.evaluation.image_grid import CANDIDATES, VERDICTS
from dpt_t2i.evaluation.provenance import command_line, set_aside, versions, write_json, write_rows
from dpt_t2i.evaluation.statistics import bootstrap_mean, category_means, improved, overall_mean, paired_difference
from dpt_t2i.evaluation.suites import NumberedPrompt, open_suite
from dpt_t2i.evaluation.verdicts import (
    Cell,
    Outcome,
    Row,
    candidates_of,
    chosen,
    judge_images,
    outcome_of,
    verdict_row,
)
from dpt_t2i.sampling.generate import parse_seeds
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.sampling.shares import processes
from dpt_t2i.scenes.facts import Verdict

logger = logging.getLogger(__name__)
SHOWN = 4  # prompts a category whose first image gets the adapter's boxes, for the report
OpenModel = Callable[[Path | None, Path | None], T2IModel]  # LoRA file, adapter folder -> model


def run_arms(config: AlignmentConfig, open_model: OpenModel) -> dict[str, Any]:
    """Make, judge and compare the arms of `config`.

    Returns:
        What `alignment.json` holds (see `summarise`); {} on any process but the main one.

    Raises:
        InputError: an unknown arm or suite, seeds that cannot be read, or weights that an arm needs and are not there.
    """
    state = processes(config.model.device)
    arms = choose_arms(config.arms)
    prompts, seeds = open_suite(config.suite, config.max_prompts), parse_seeds(config.seeds)
    recipes = {arm.name: recipe_of(arm, config) for arm in arms if arm.random_of is None}
    rows = _make_all(config, [arm for arm in arms if arm.name in recipes], recipes, prompts, seeds, open_model, state)
    if not state.is_main_process:
        return {}
    verdicts = {name: judge_images(_folder(config, name), rows[name], prompts) for name in recipes}
    outcomes: dict[str, Outcome] = {}
    for arm in arms:
        source = arm.random_of or arm.name
        candidates = candidates_of(rows[source], prompts, seeds, arm.best_of)
        outcomes[arm.name] = outcome_of(arm, candidates, verdicts[source], prompts, seeds)
        if arm.name in recipes:
            _write_verdicts(_folder(config, arm.name), arm, candidates, verdicts[source], prompts)
    result = summarise(prompts, seeds, outcomes, config.bootstrap_draws, config.seed) | {
        "suite": config.suite,
        "settings": config.model_dump(mode="json")
        | {"arm_settings": {name: _without_seed(rows[name][0]["settings"]) for name in recipes}},
        "command": command_line(),
        "versions": versions(),
    }
    files = (config.output_dir / name for name in ("alignment.json", "report.html"))
    set_aside(config.model_dump(mode="json"), *files)
    write_json(config.output_dir / "alignment.json", result)
    if config.suite.startswith("test_"):
        _log_test_run(config, result)
    return result


def summarise(
    prompts: Sequence[NumberedPrompt],
    seeds: Sequence[int],
    outcomes: Mapping[str, Outcome],
    draws: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Numbers of all arms and of the pairs among them, plain JSON.

    Returns:
        prompts: how many. seeds. categories: prompts in each.
        arms: arm -> `overall` (mean of the categories), each category, `extra_objects` (share of images with things
            that nobody asked for); all in [0, 1].
        intervals: arm -> the same names but `extra_objects` -> `low`, `high` (95 %, bootstrap over prompts).
        differences: `A-B` -> `mean low high` of the paired difference of `overall` (95 %, bootstrap over prompts), and
            the same three under `categories` for each category and under `extra_objects`.
        fixed, broken: `A-B` -> prompts that A gets right on more, or fewer, seeds than B, with the seeds that changed.
    """
    categories = [p.prompt.category for p in prompts]
    pairs = [(a, b) for a, b in PAIRS if a in outcomes and b in outcomes]
    told = [(a, b) for a, b in pairs if not (ARMS[a].random_of or ARMS[b].random_of)]  # an expectation fixes nothing
    return {
        "prompts": len(prompts),
        "seeds": list(seeds),
        "categories": {name: categories.count(name) for name in dict.fromkeys(categories)},
        "arms": {name: _numbers(outcome, categories) for name, outcome in outcomes.items()},
        "intervals": {name: _intervals(outcome, categories, draws, seed) for name, outcome in outcomes.items()},
        "differences": {f"{a}-{b}": _difference(outcomes[a], outcomes[b], categories, draws, seed) for a, b in pairs},
        "fixed": {f"{a}-{b}": _changed(prompts, seeds, outcomes[a], outcomes[b]) for a, b in told},
        "broken": {f"{a}-{b}": _changed(prompts, seeds, outcomes[b], outcomes[a]) for a, b in told},
    }


def _numbers(outcome: Outcome, categories: Sequence[str]) -> dict[str, float]:
    return {
        "overall": overall_mean(outcome.correct, categories),
        **category_means(outcome.correct, categories),
        "extra_objects": float(outcome.extra.mean()),
    }


def _intervals(outcome: Outcome, categories: Sequence[str], draws: int, seed: int) -> dict[str, dict[str, float]]:
    names = np.asarray(categories)
    whole = bootstrap_mean(outcome.correct, categories, draws, seed)
    parts = {
        name: bootstrap_mean(outcome.correct[names == name], [name] * categories.count(name), draws, seed)
        for name in dict.fromkeys(categories)
    }
    return {name: {"low": i.low, "high": i.high} for name, i in {"overall": whole, **parts}.items()}


def _difference(first: Outcome, second: Outcome, categories: Sequence[str], draws: int, seed: int) -> dict[str, Any]:
    names = np.asarray(categories)

    def within(name: str) -> dict[str, float]:
        rows = names == name
        return asdict(
            paired_difference(first.correct[rows], second.correct[rows], [name] * int(rows.sum()), draws, seed)
        )

    alike = ["all"] * len(categories)  # extra objects are counted over images, whatever their category
    return {
        **asdict(paired_difference(first.correct, second.correct, categories, draws, seed)),
        "categories": {name: within(name) for name in dict.fromkeys(categories)},
        "extra_objects": asdict(paired_difference(first.extra, second.extra, alike, draws, seed)),
    }


def _changed(
    prompts: Sequence[NumberedPrompt], seeds: Sequence[int], better: Outcome, worse: Outcome
) -> list[dict[str, Any]]:
    return [
        {
            "prompt_index": prompts[row].index,
            "prompt": prompts[row].prompt.text,
            "category": prompts[row].prompt.category,
            "seeds": [s for s, a, b in zip(seeds, better.correct[row], worse.correct[row], strict=True) if a > b],
        }
        for row in improved(better.correct, worse.correct)
    ]


def _make_all(
    config: AlignmentConfig,
    arms: Sequence[Arm],
    recipes: Mapping[str, Recipe],
    prompts: Sequence[NumberedPrompt],
    seeds: Sequence[int],
    open_model: OpenModel,
    state: PartialState,
) -> dict[str, list[dict[str, Any]]]:
    """Images of every arm, and the manifests' rows. Neighbours in the table with equal weights share one model."""
    rows: dict[str, list[dict[str, Any]]] = {}
    loaded: tuple[tuple[Path | None, Path | None], T2IModel] | None = None
    for arm in arms:
        recipe, folder = recipes[arm.name], _folder(config, arm.name)
        if loaded is None or loaded[0] != (recipe.lora, recipe.adapter):
            loaded = None  # let go of the old weights before the new ones come
            loaded = (recipe.lora, recipe.adapter), open_model(recipe.lora, recipe.adapter)
        jobs = jobs_of_arm(prompts, seeds, arm.best_of, config.own_noise)
        logger.info("arm %s: %d images", arm.name, len(jobs))
        if arm.best_of > 1 and state.is_main_process:
            borrow_images(folder, _folder(config, _without_search(arm)), jobs)
        state.wait_for_everyone()
        rows[arm.name] = make_images(folder, jobs, loaded[1], recipe.settings, arm.name, state)
        if state.is_main_process and recipe.adapter is not None:
            shown = [chosen(c) for c in candidates_of(rows[arm.name], _first(prompts), seeds[:1], arm.best_of).values()]
            write_rows(folder / "boxes.jsonl", _boxes(loaded[1], folder, shown, config))
    return rows


def _write_verdicts(
    folder: Path,
    arm: Arm,
    candidates: Mapping[Cell, Sequence[Row]],
    verdicts: Mapping[str, Verdict],
    prompts: Sequence[NumberedPrompt],
) -> None:
    category = {p.index: p.prompt.category for p in prompts}

    def write(name: str, pick: Callable[[Sequence[Row]], Sequence[Row]]) -> None:
        lines = (
            verdict_row(row, verdicts[row["file"]], seed, category[index])
            for (index, seed), tried in candidates.items()
            for row in pick(tried)
        )
        write_rows(folder / name, lines)

    write(VERDICTS, lambda tried: [chosen(tried)])
    if arm.best_of > 1:
        write(CANDIDATES, lambda tried: tried)


def _boxes(model: T2IModel, folder: Path, rows: Sequence[Row], config: AlignmentConfig) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        with Image.open(folder / row["file"]) as image:
            judged = model.score(
                image, row["prompt"], config.search.score_timestep, config.search.score_draws, config.seed
            )
        found.append({"file": row["file"], "phrases": [asdict(phrase) for phrase in judged.phrases]})
    return found


def _without_search(arm: Arm) -> str:
    """The arm whose images are the first candidates of `arm`'s search."""
    return next(a.name for a in ARMS.values() if a == replace(arm, name=a.name, best_of=1))


def _without_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "noise_seed"}


def _first(prompts: Sequence[NumberedPrompt]) -> list[NumberedPrompt]:
    categories = dict.fromkeys(p.prompt.category for p in prompts)
    return [p for c in categories for p in [p for p in prompts if p.prompt.category == c][:SHOWN]]


def _folder(config: AlignmentConfig, arm: str) -> Path:
    return config.output_dir / "arms" / arm


def _log_test_run(config: AlignmentConfig, result: Mapping[str, Any]) -> None:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "suite": config.suite,
        "output_dir": str(config.output_dir),
        "prompts": result["prompts"],
        "seeds": result["seeds"],
        "overall": {name: numbers["overall"] for name, numbers in result["arms"].items()},
        "command": result["command"],
    }
    file = config.test_log or config.output_dir.parent / "test_runs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
