"""`dpt evaluate images`: outside encoders say how well generated images go with their prompts, folder beside folder.

output_dir/
  image_scores.json    means, intervals and paired differences
  image_scores.jsonl   one line an image and measure

For any base: the judges see pictures. What they can tell on these very pictures is measured beside it: each image is
also scored with another of the prompts, and a judge that does not prefer the own one by more than chance is no judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from tqdm import tqdm

from dpt_t2i.backbones.pair_scorer import PairScorer, load_pair_scorer
from dpt_t2i.config import ImageScoresConfig
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.image_grid import ALL, Cell, Grid, open_grid, short_names
from dpt_t2i.evaluation.miner import miner_warnings
from dpt_t2i.evaluation.provenance import command_line, set_aside, versions, write_json, write_rows
from dpt_t2i.evaluation.statistics import bootstrap_mean, category_means, paired_difference, wilson
from dpt_t2i.sampling.images import open_image
from dpt_t2i.sampling.shares import gathered, processes, share_of

Scores = NDArray[np.float64]


def run_image_scores(config: ImageScoresConfig) -> dict[str, Any]:
    """Score and compare; an empty summary on any process but the main one.

    Raises:
        InputError: no folder, one that is no generation folder, folders of other prompts or seeds, a scorer that does
            not load, a prompt that the prompts file does not have, a data set that is not there, or an image that
            cannot be read.
    """
    state = processes(config.device)
    grid = open_grid(config.folders, config.prompts_file)
    for data in config.trained_on:
        if not data.is_dir():
            raise InputError(f"trained_on {data} is no folder; give the imagefolder that the run was trained on")
    scorers = [load_pair_scorer(name, config.device) for name in dict.fromkeys(config.scorers)]
    if not scorers:
        raise InputError("nothing scores the images; give --scorers, for instance openai/clip-vit-large-patch14")
    scores = {}
    for label, scorer in zip(short_names([s.name for s in scorers]), scorers, strict=True):
        for measure, values in _score(grid, scorer, config.encode_batch_size, state).items():
            scores[f"{label}:{measure}"] = values
    if not state.is_main_process:
        return {"summary": []}
    result = summarise(grid, scores, config.bootstrap_draws, config.seed)
    warnings = [*grid.warnings, *_cut(grid, scorers), *_blind(result["measures"], len(grid.prompts))]
    for data, scorer in product(config.trained_on, scorers):
        warnings += miner_warnings(data, scorer.fingerprint, f"scorer `{scorer.name}`")
    result |= {
        "warnings": warnings,
        "scorers": {scorer.name: dict(scorer.fingerprint) for scorer in scorers},
        "settings": config.model_dump(mode="json"),
        "command": command_line(),
        "versions": versions(),
    }
    result_file, rows_file = config.output_dir / "image_scores.json", config.output_dir / "image_scores.jsonl"
    set_aside(config.model_dump(mode="json"), result_file, rows_file)
    write_rows(rows_file, _rows(grid, scores))
    write_json(result_file, result)
    return result | {"summary": [*_lines(result), *warnings]}


def summarise(grid: Grid, scores: Mapping[str, Scores], draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Numbers, plain JSON.

    Args:
        scores: measure -> `[2, F, P, S]`: with the own prompt, and with another one (NaN where there is one prompt).

    Returns:
        prompts, seeds, categories: how many, which, prompts in each.
        measures: measure -> folder -> `mean low high` (mean of the categories; 95 %, bootstrap over prompts),
            `categories`, and `told_apart`: the same three of the share of images that score higher with their own
            prompt than with another one, equal scores half (chance 0.5); None where there is one prompt.
        differences: measure -> `LATER-EARLIER` -> `mean low high` of the paired difference, and `wins`: the share of
            images whose score is higher in the first-named folder, equal ones half.
    """
    categories = grid.categories
    measures: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for measure, (own, other) in scores.items():
        measures[measure] = {
            name: asdict(bootstrap_mean(own[f], categories, draws, seed))
            | {
                "categories": category_means(own[f], categories),
                "told_apart": _told_apart(own[f], other[f], draws, seed),
            }
            for f, name in enumerate(grid.names)
        }
        differences[measure] = {
            pair: asdict(paired_difference(own[a], own[b], categories, draws, seed))
            | {"wins": float(_higher(own[a], own[b]).mean())}
            for pair, (a, b) in _pairs(grid.names).items()
        }
    return {
        "prompts": len(grid.prompts),
        "seeds": list(grid.seeds),
        "categories": {name: categories.count(name) for name in dict.fromkeys(categories)},
        "folders": {name: str(folder) for name, folder in zip(grid.names, grid.folders, strict=True)},
        "measures": measures,
        "differences": differences,
    }


def _pairs(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """`LATER-EARLIER` -> their places; with another sign between them where hyphens in the names make two pairs one.

    Raises:
        InputError: no sign tells all pairs apart.
    """
    places = [(later, earlier) for earlier in range(len(names)) for later in range(earlier + 1, len(names))]
    for sign in ("-", " - "):
        pairs = {f"{names[a]}{sign}{names[b]}": (a, b) for a, b in places}
        if len(pairs) == len(places):
            return pairs
    raise InputError("pairs of these folders cannot be told apart by name; rename one whose name has a ` - `")


def _score(grid: Grid, scorer: PairScorer, batch: int, state: PartialState) -> dict[str, Scores]:
    """Measure -> `[2, F, P, S]`, all of it on every process; each process scores a part of the images."""
    cells, count = list(grid.files), len(grid.prompts)
    mine = [cells[i] for i in share_of(len(cells), state)]
    found: list[tuple[Cell, dict[str, tuple[float, ...]]]] = []
    for start in tqdm(range(0, len(mine), batch), desc=scorer.name, unit="batch", disable=not state.is_main_process):
        part = mine[start : start + batch]
        pictures = [open_image(grid.files[cell]) for cell in part]
        texts = [[grid.prompts[p] for _, p, _ in part]]
        if count > 1:  # half the list away: neighbours may be pairs that differ in a word, which is another question
            texts.append([grid.prompts[(p + count // 2) % count] for _, p, _ in part])
        told = scorer.score(pictures, texts)
        for i, cell in enumerate(part):
            found.append((cell, {m: tuple(float(scores[m][i]) for scores in told) for m in scorer.measures}))
    values = {measure: np.full((2, *grid.shape), np.nan) for measure in scorer.measures}
    for cell, pair in gathered(found, state):
        for measure, both in pair.items():
            values[measure][: len(both), *cell] = both
    for measure, table in values.items():
        asked = table[: min(count, 2)]
        if bad := [file for cell, file in grid.files.items() if not np.isfinite(asked[:, *cell]).all()]:
            raise InputError(f"scorer `{scorer.name}`: {measure} of {bad[0]} is NaN")
    return values


def _told_apart(own: Scores, other: Scores, draws: int, seed: int) -> dict[str, float] | None:
    """The control: the judge's own accuracy at choosing between two prompts."""
    if np.isnan(other).any():
        return None
    return asdict(bootstrap_mean(_higher(own, other), [ALL] * len(own), draws, seed))


def _higher(first: Scores, second: Scores) -> Scores:
    higher: Scores = (first > second) + 0.5 * (first == second)
    return higher


def _cut(grid: Grid, scorers: Sequence[PairScorer]) -> list[str]:
    """A warning for each scorer that does not read the end of some prompts."""
    found = [(scorer.name, scorer.cut(grid.prompts)) for scorer in scorers]
    return [
        f"warning: scorer `{name}` does not read the end of {len(cut)} prompts, such as `{cut[0]:.60}...`"
        for name, cut in found
        if cut
    ]


def _blind(measures: Mapping[str, Mapping[str, Any]], prompts: int) -> list[str]:
    """A warning for each measure that was not seen to tell these prompts apart, on any folder's images.

    Images of one prompt are no independent witnesses, so there are as many trials as prompts; and the best of several
    folders has to be as much better as that takes.
    """
    lines = []
    for measure, folders in measures.items():
        told = [numbers["told_apart"]["mean"] for numbers in folders.values() if numbers["told_apart"] is not None]
        if told and wilson(max(told) * prompts, prompts, intervals=len(told))[0] <= 0.5:
            lines.append(
                f"warning: {measure} prefers the own prompt of an image to another one in {100 * max(told):.0f} % of "
                "cases at best, which may be chance (50): it does not know such pictures, they do not show their "
                f"prompts, or {prompts} prompts are too few; its figures say nothing"
            )
    return lines


def _rows(grid: Grid, scores: Mapping[str, Scores]) -> Iterator[dict[str, Any]]:
    for (f, p, s), file in grid.files.items():
        yield {
            "folder": grid.names[f],
            "file": file.relative_to(grid.folders[f]).as_posix(),
            "prompt": grid.prompts[p],
            "category": grid.categories[p],
            "seed": grid.seeds[s],
            "scores": {measure: float(own[f, p, s]) for measure, (own, _) in scores.items()},
        }


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{result['prompts']} prompts, seeds {', '.join(map(str, result['seeds']))}"]
    for measure, folders in result["measures"].items():
        for name, numbers in folders.items():
            told = numbers["told_apart"]
            control = "" if told is None else f"; own prompt preferred to another: {100 * told['mean']:.0f} %"
            lines.append(
                f"{measure}  {name}: {numbers['mean']:.4f} [{numbers['low']:.4f}, {numbers['high']:.4f}]{control}"
            )
        for pair, d in result["differences"][measure].items():
            lines.append(
                f"{measure}  {pair}: {d['mean']:+.4f}, 95 % [{d['low']:+.4f}, {d['high']:+.4f}], "
                f"higher in {100 * d['wins']:.0f} % of the images"
            )
    return lines
