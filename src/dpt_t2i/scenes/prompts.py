"""The benchmark's prompts: three disjoint, committed files.

`dev` is for every choice; `test_seen` (training compositions) and `test_heldout` (compositions that no stage ever saw)
are run once for each published configuration. `python -m dpt_t2i.scenes.prompts` writes the files again, byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpt_t2i.errors import InputError
from dpt_t2i.scenes.facts import Fact, Phrase
from dpt_t2i.scenes.language import CATEGORIES, Caption, Category, caption
from dpt_t2i.scenes.plans import draw_plan

Suite = Literal["dev", "test_seen", "test_heldout"]
FOLDER = Path(__file__).with_name("prompts")
# Prompts a category. Held-out prompts exist only where a composition is named.
SIZES: dict[Suite, dict[Category, int]] = {
    "dev": {category: 50 for category in CATEGORIES},
    "test_seen": {category: 170 for category in CATEGORIES},
    "test_heldout": {category: 100 for category in ("counting", "colors", "position", "color_attribution")},
}


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of the benchmark and what it claims."""

    text: str
    category: Category
    facts: tuple[Fact, ...]


def load_suite(name: str) -> list[SuitePrompt]:
    """The prompts of `dev`, `test_seen` or `test_heldout`, in their fixed order.

    Raises:
        InputError: no suite has this name.
    """
    file = FOLDER / f"{name}.jsonl"
    if name not in SIZES or not file.is_file():
        raise InputError(f"unknown prompt suite `{name}`; there are {', '.join(SIZES)}")
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return [SuitePrompt(row["prompt"], row["category"], tuple(map(_fact, row["facts"]))) for row in rows]


def draw_suites(seed: int = 7) -> dict[Suite, list[SuitePrompt]]:
    """Draw all three suites; no text stands in two of them, nor twice in one."""
    taken: set[str] = set()
    suites: dict[Suite, list[SuitePrompt]] = {}
    for number, (suite, sizes) in enumerate(SIZES.items()):
        prompts: list[SuitePrompt] = []
        for category, count in sizes.items():
            rng = np.random.default_rng([seed, number, CATEGORIES.index(category)])
            fresh = _fresh(category, rng, suite == "test_heldout", taken)
            prompts.extend(SuitePrompt(c.text, category, c.facts) for c, _ in zip(fresh, range(count), strict=False))
        suites[suite] = prompts
    return suites


def write_suites(folder: Path = FOLDER) -> None:
    """Write each suite as JSON lines: `prompt`, `category`, `split`, `facts`."""
    folder.mkdir(exist_ok=True)
    for suite, prompts in draw_suites().items():
        lines = [
            json.dumps(
                {
                    "prompt": p.text,
                    "category": p.category,
                    "split": "heldout" if suite == "test_heldout" else "seen",
                    "facts": [asdict(fact) for fact in p.facts],
                }
            )
            for p in prompts
        ]
        (folder / f"{suite}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _fresh(category: Category, rng: np.random.Generator, held_out: bool, taken: set[str]) -> Iterator[Caption]:
    while True:
        told = caption(draw_plan(category, rng, held_out=held_out))
        if told.text not in taken:
            taken.add(told.text)
            yield told


def _fact(row: dict[str, Any]) -> Fact:
    other = row["other"]
    return Fact(
        kind=row["kind"],
        phrase=Phrase(**row["phrase"]),
        count=row["count"],
        relation=row["relation"],
        other=None if other is None else Phrase(**other),
    )


if __name__ == "__main__":
    write_suites()
