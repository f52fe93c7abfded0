"""The checker's judgement of an arm's images: one row an image, and the arm's outcome as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpt_t2i.evaluation.arms import Arm
from dpt_t2i.evaluation.statistics import Accuracies
from dpt_t2i.evaluation.suites import NumberedPrompt
from dpt_t2i.sampling.search import best_seed, candidate_seeds
from dpt_t2i.scenes.checker import check
from dpt_t2i.scenes.facts import Verdict

Row = Mapping[str, Any]  # of a manifest: file prompt_index prompt seed score ...; here `seed` is the candidate's
Cell = tuple[int, int]  # prompt index, seed


@dataclass(frozen=True)
class Outcome:
    """How an arm did; prompts x seeds, each entry in [0, 1]."""

    correct: Accuracies  # [P, S] all facts of the prompt hold
    extra: Accuracies  # [P, S] there are things that nobody asked for


def candidates_of(
    rows: Iterable[Row], prompts: Sequence[NumberedPrompt], seeds: Sequence[int], best_of: int
) -> dict[Cell, list[Row]]:
    """The candidates of every (prompt, seed), in the order in which they were tried."""
    made = {(row["prompt_index"], row["seed"]): row for row in rows}
    return {
        (p.index, seed): [made[p.index, candidate] for candidate in candidate_seeds(seed, best_of)]
        for p in prompts
        for seed in seeds
    }


def chosen(candidates: Sequence[Row]) -> Row:
    """The candidate with the best score; a single one needs none."""
    if len(candidates) == 1:
        return candidates[0]
    best = best_seed({row["seed"]: row["score"] for row in candidates})
    return next(row for row in candidates if row["seed"] == best)


def judge_images(folder: Path, rows: Iterable[Row], prompts: Sequence[NumberedPrompt]) -> dict[str, Verdict]:
    """The checker's verdict of each file of a manifest."""
    facts = {p.index: p.prompt.facts for p in prompts}
    verdicts = {}
    for row in rows:
        with Image.open(folder / row["file"]) as image:
            verdicts[row["file"]] = check(image.convert("RGB"), facts[row["prompt_index"]])
    return verdicts


def outcome_of(
    arm: Arm,
    candidates: Mapping[Cell, Sequence[Row]],
    verdicts: Mapping[str, Verdict],
    prompts: Sequence[NumberedPrompt],
    seeds: Sequence[int],
) -> Outcome:
    """Of a search the chosen candidate counts; of a blind pick the mean over the candidates."""

    def cell(prompt: NumberedPrompt, seed: int) -> tuple[float, float]:
        tried = candidates[prompt.index, seed]
        counted = [verdicts[row["file"]] for row in (tried if arm.random_of else [chosen(tried)])]
        return float(np.mean([v.correct for v in counted])), float(np.mean([v.extra_objects > 0 for v in counted]))

    table = np.array([[cell(prompt, seed) for seed in seeds] for prompt in prompts])  # [P, S, 2]
    return Outcome(table[..., 0], table[..., 1])


def verdict_row(row: Row, verdict: Verdict, seed: int, category: str) -> dict[str, Any]:
    """A line of `verdicts.jsonl`; boxes of seen things are xyxy in fractions of the side."""
    return {
        "file": row["file"],
        "prompt_index": row["prompt_index"],
        "prompt": row["prompt"],
        "category": category,
        "seed": seed,
        "candidate_seed": row["seed"],
        "score": row["score"],
        "correct": verdict.correct,
        "facts": [{"text": str(fact), "holds": holds} for fact, holds in verdict.facts],
        "extra_objects": verdict.extra_objects,
        "seen": [asdict(thing) for thing in verdict.seen],
    }
