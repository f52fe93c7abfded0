"""Means over prompts and categories, and how far they may be trusted.

Accuracies are arrays `[P, S]`: prompt x seed, each entry in [0, 1] (1 = right; a fraction where it is an expectation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

BLOCK = 500  # resamples at once; the same whatever it is
Accuracies = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def category_means(correct: Accuracies, categories: Sequence[str]) -> dict[str, float]:
    """Mean of every category, in the order of first appearance; `categories` names that of each of the P prompts."""
    names = np.asarray(categories)
    return {name: float(correct[names == name].mean()) for name in dict.fromkeys(categories)}


def overall_mean(correct: Accuracies, categories: Sequence[str]) -> float:
    """Mean of the categories' means: a large category weighs no more than a small one (as in GenEval)."""
    return float(np.mean(list(category_means(correct, categories).values())))


def bootstrap_mean(correct: Accuracies, categories: Sequence[str], draws: int = 10_000, seed: int = 0) -> Interval:
    """`overall_mean` with the percentile interval of a bootstrap over prompts.

    A prompt is drawn with all its seeds, since they share its difficulty, and within its category, whose number of
    prompts was fixed beforehand. Equal `seed` and prompts are equal resamples for every arm.
    """
    names = np.asarray(categories)
    rng = np.random.default_rng(seed)
    resampled = np.zeros(draws)
    groups = list(dict.fromkeys(categories))
    for name in groups:
        per_prompt = correct[names == name].mean(axis=1)
        for start in range(0, draws, BLOCK):  # all at once would take gigabytes for tens of thousands of prompts
            part = resampled[start : start + BLOCK]
            picks = rng.integers(len(per_prompt), size=(len(part), len(per_prompt)))
            part += per_prompt[picks].mean(axis=1) / len(groups)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(overall_mean(correct, categories), float(low), float(high))


def paired_difference(
    first: Accuracies, second: Accuracies, categories: Sequence[str], draws: int = 10_000, seed: int = 0
) -> Interval:
    """`first` - `second` of two arms over the same prompts and seeds: the bootstrap of their per-image differences."""
    return bootstrap_mean(first - second, categories, draws, seed)


def wilson(successes: float, trials: int, intervals: int = 1) -> tuple[float, float]:
    """95 % interval of a share of independent trials (Wilson, 1927); (0, 1) without any.

    With several `intervals` this is one of those that hold all together in 95 % of cases (Bonferroni).
    """
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - 0.025 / intervals)
    share = successes / trials
    center = share + z * z / (2 * trials)
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def improved(first: Accuracies, second: Accuracies) -> list[int]:
    """Prompts (rows) that are right on more seeds in `first` than in `second`."""
    return np.flatnonzero(first.mean(axis=1) > second.mean(axis=1)).tolist()
