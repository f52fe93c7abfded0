"""Means, intervals and lists, against hand counts and a slow bootstrap written with loops."""

import random
from statistics import mean

import numpy as np
import pytest

from dpt_t2i.evaluation import statistics
from dpt_t2i.evaluation.statistics import (
    bootstrap_mean,
    category_means,
    improved,
    overall_mean,
    paired_difference,
    wilson,
)

CATEGORIES = ["colors", "colors", "colors", "position"]
CORRECT = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])


def test_category_means_are_over_prompts_and_seeds() -> None:
    assert category_means(CORRECT, CATEGORIES) == {"colors": 0.5, "position": 0.5}
    assert category_means(CORRECT[:2], CATEGORIES[:2]) == {"colors": 0.75}


def test_a_small_category_weighs_as_much_as_a_large_one() -> None:
    correct = np.array([[1.0], [1.0], [1.0], [0.0]])
    assert overall_mean(correct, CATEGORIES) == 0.5  # not 0.75


def slow_bootstrap(correct: np.ndarray, categories: list[str], draws: int) -> tuple[float, float]:
    """Pure Python, other random numbers, one resample at a time."""
    rng = random.Random(5)
    groups = [[list(row) for row, name in zip(correct, categories, strict=True) if name == g] for g in set(categories)]
    results = []
    for _ in range(draws):
        means = []
        for group in groups:
            picked = [rng.choice(group) for _ in group]
            means.append(mean(value for row in picked for value in row))
        results.append(mean(means))
    results.sort()
    return results[int(0.025 * draws)], results[int(0.975 * draws)]


def test_the_bootstrap_agrees_with_a_slow_one() -> None:
    rng = np.random.default_rng(0)
    categories = ["a"] * 30 + ["b"] * 10
    correct = (rng.random((40, 2)) < np.linspace(0.2, 0.9, 40)[:, None]).astype(float)
    fast = bootstrap_mean(correct, categories, draws=4000, seed=1)
    low, high = slow_bootstrap(correct, categories, draws=4000)
    assert fast.mean == overall_mean(correct, categories)
    assert fast.low == pytest.approx(low, abs=0.015) and fast.high == pytest.approx(high, abs=0.015)


def test_the_seeds_of_a_prompt_stay_together() -> None:
    # 20 prompts, each right or wrong on all seeds: 50 seeds tell no more than one does.
    one = np.repeat([[1.0], [0.0]], 10, axis=0)
    many = np.repeat(one, 50, axis=1)
    a, b = (bootstrap_mean(x, ["c"] * 20, draws=2000) for x in (one, many))
    assert (a.low, a.high) == (b.low, b.high)
    assert a.high - a.low > 0.3


def test_pairing_cancels_what_arms_share() -> None:
    rng = np.random.default_rng(3)
    base = rng.integers(0, 2, size=(60, 1)).astype(float)
    better = base.copy()
    better[np.flatnonzero(base[:, 0] == 0)[:6]] = 1.0
    difference = paired_difference(better, base, ["c"] * 60)
    assert difference.mean == pytest.approx(0.1)
    assert difference.low > 0  # unpaired, +-0.13 around 0.5 would hide it
    swapped = paired_difference(base, better, ["c"] * 60)
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low), abs=0.02)


def test_equal_arms_have_no_difference_and_a_seed_repeats() -> None:
    none = paired_difference(CORRECT, CORRECT, CATEGORIES)
    assert (none.mean, none.low, none.high) == (0.0, 0.0, 0.0)
    assert bootstrap_mean(CORRECT, CATEGORIES, seed=4) == bootstrap_mean(CORRECT, CATEGORIES, seed=4)


def test_wilson_by_hand() -> None:
    # n = 10, all wrong: 0 .. z^2 / (n + z^2) = 3.8415 / 13.8415
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    low, high = wilson(5, 10)
    assert low + high == pytest.approx(1.0) and low == pytest.approx(0.23659, abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_improved_lists_rows_with_more_right_seeds() -> None:
    better = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert improved(better, CORRECT) == []
    assert improved(CORRECT, better) == [3]


def test_blocks_of_resamples_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = np.random.default_rng(3).random((37, 2))
    names = ["a"] * 20 + ["b"] * 17
    cut = bootstrap_mean(correct, names, 1_203, 4)
    monkeypatch.setattr(statistics, "BLOCK", 10_000)
    assert bootstrap_mean(correct, names, 1_203, 4) == cut
