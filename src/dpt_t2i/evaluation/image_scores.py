"""`dpt evaluate images`: outside encoders say how well generated images go with their prompts, folder beside folder.

output_dir/
  image_scores.json    means, intervals and paired differences
  image_scores.jsonl   one line an image and measure

For any base: the judges see pictures. What they can tell on these very pictures is measured beside it: each image is
also scored with another of the prompts, and a judge that does not prefer the own one by more than chance is no judge.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dpt_t2i.backbones.pair_scorer import PairScorer, load_pair_scorer
from dpt_t2i.config import ImageScoresConfig
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.image_grid import Cell, Grid, open_grid, short_names
from dpt_t2i.evaluation.miner import miner_warnings
from dpt_t2i.evaluation.provenance import command_line, versions, write_json, write_rows
from dpt_t2i.evaluation.statistics import bootstrap_mean, category_means, paired_difference
from dpt_t2i.sampling.shares import gathered, processes, share_of

logger = logging.getLogger(__name__)


def run_image_scores(config: ImageScoresConfig) -> dict[str, Any]:
    """Score and compare; a summary too. {} on any process but the main one.

    Raises:
        InputError: no folder, one that is no generation folder, folders of other prompts or seeds, a scorer that does
            not load, a prompt that the prompts file does not have, or an image that cannot be read.
    """
    state = processes(config.device)
    grid = open_grid(config.folders, config.prompts_file)
    scorers = [load_pair_scorer(name, config.device) for name in dict.fromkeys(config.scorers)]
    if not scorers:
        raise InputError("nothing scores the images; give --scorers, for instance openai/clip-vit-large-patch14")
    scores = {}
    for label, scorer in zip(short_names([s.name for s in scorers]), scorers, strict=True):
        for measure, values in _score(grid, scorer, config.encode_batch_size, state).items():
            scores[f"{label}:{measure}"] = values
    if not state.is_main_process:
        return {"summary": []}
    warnings = [
        line
        for data in config.trained_on
        for scorer in scorers
        for line in miner_warnings(data, scorer.fingerprint, f"scorer `{scorer.name}`")
    ]
    result = summarise(grid, scores, config.bootstrap_draws, config.seed)
    warnings += _blind(result["measures"])
    result |= {
        "warnings": warnings,
        "settings": config.model_dump(mode="json"),
        "command": command_line(),
        "versions": versions(),
    }
    write_rows(config.output_dir / "image_scores.jsonl", _rows(grid, scores))
    write_json(config.output_dir / "image_scores.json", result)
    return result | {"summary": [*_lines(result), *warnings]}


def summarise(
    grid: Grid, scores: Mapping[str, NDArray[np.float64]], draws: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Numbers, plain JSON.

    Args:
        scores: measure -> `[2, F, P, S]`: with the own prompt, and with another one (NaN where there is one prompt).

    Returns:
        prompts, seeds, categories: how many, which, prompts in each.
        measures: measure -> folder -> `mean low high` (mean of the categories; 95 %, bootstrap over prompts),
            `categories`, and `told_apart` (share of images that score higher with their own prompt; chance 0.5), None
            where there is one prompt.
        differences: measure -> `LATER-EARLIER` -> `mean low high` of the paired difference, and `wins`: the share of
            images whose score is higher in the first-named folder, equal ones half.
    """
    categories = grid.categories
    measures: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for measure, (own, other) in scores.items():
        measures[measure] = {
            name: asdict(bootstrap_mean(own[f], categories, draws, seed))
            | {"categories": category_means(own[f], categories), "told_apart": _told_apart(own[f], other[f])}
            for f, name in enumerate(grid.names)
        }
        pairs = [(later, earlier) for earlier in range(len(own)) for later in range(earlier + 1, len(own))]
        differences[measure] = {
            f"{grid.names[a]}-{grid.names[b]}": asdict(paired_difference(own[a], own[b], categories, draws, seed))
            | {"wins": float(np.mean((own[a] > own[b]) + 0.5 * (own[a] == own[b])))}
            for a, b in pairs
        }
    return {
        "prompts": len(grid.prompts),
        "seeds": list(grid.seeds),
        "categories": {name: categories.count(name) for name in dict.fromkeys(categories)},
        "folders": {name: str(folder) for name, folder in zip(grid.names, grid.folders, strict=True)},
        "measures": measures,
        "differences": differences,
    }


def _score(grid: Grid, scorer: PairScorer, batch: int, state: PartialState) -> dict[str, NDArray[np.float64]]:
    """Measure -> `[2, F, P, S]`, all of it on every process; each process scores a part of the images."""
    cells, count = list(grid.files), len(grid.prompts)
    mine = [cells[i] for i in share_of(len(cells), state)]
    found: list[tuple[Cell, dict[str, tuple[float, float]]]] = []
    for start in tqdm(range(0, len(mine), batch), desc=scorer.name, unit="batch", disable=not state.is_main_process):
        part = mine[start : start + batch]
        pictures = [_open(grid.files[cell]) for cell in part]
        own = scorer.score(pictures, [grid.prompts[p] for _, p, _ in part])
        # Half the list away: neighbours may be pairs that differ in a word, which is another question.
        other = scorer.score(pictures, [grid.prompts[(p + count // 2) % count] for _, p, _ in part])
        for i, cell in enumerate(part):
            pair = {m: (float(own[m][i]), float(other[m][i]) if count > 1 else np.nan) for m in scorer.measures}
            found.append((cell, pair))
    values = {measure: np.full((2, *grid.shape), np.nan) for measure in scorer.measures}
    for cell, pair in gathered(found, state):
        for measure, both in pair.items():
            values[measure][:, *cell] = both
    for measure, table in values.items():
        if bad := [file for cell, file in grid.files.items() if not np.isfinite(table[0][cell])]:
            raise InputError(f"scorer `{scorer.name}`: {measure} of {bad[0]} is NaN")
    return values


def _told_apart(own: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    known = np.isfinite(other)
    return float(np.mean(own[known] > other[known])) if known.any() else None


def _blind(measures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning for each measure that cannot tell these prompts apart on any folder's images."""
    lines = []
    for measure, folders in measures.items():
        shares = [numbers["told_apart"] for numbers in folders.values() if numbers["told_apart"] is not None]
        if shares and max(shares) < 0.6:
            lines.append(
                f"warning: {measure} prefers the own prompt of an image to another one in {100 * max(shares):.0f} % of "
                "cases at best (chance 50): it does not know such pictures, and its figures say nothing"
            )
    return lines


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot read image {path}: {error}; run the same `dpt generate` once more") from error


def _rows(grid: Grid, scores: Mapping[str, NDArray[np.float64]]) -> Iterator[dict[str, Any]]:
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
            control = "" if told is None else f"; own prompt preferred to another: {100 * told:.0f} %"
            lines.append(
                f"{measure}  {name}: {numbers['mean']:.4f} [{numbers['low']:.4f}, {numbers['high']:.4f}]{control}"
            )
        for pair, d in result["differences"][measure].items():
            lines.append(
                f"{measure}  {pair}: {d['mean']:+.4f}, 95 % [{d['low']:+.4f}, {d['high']:+.4f}], "
                f"higher in {100 * d['wins']:.0f} % of the images"
            )
    return lines
