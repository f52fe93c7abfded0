"""The images of several generation folders, laid out by folder, prompt and seed, so that they can be paired."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt_t2i.errors import InputError
from dpt_t2i.sampling.folder import read_manifest
from dpt_t2i.sampling.prompts_file import read_prompts_file

VERDICTS, CANDIDATES = "verdicts.jsonl", "candidates.jsonl"  # of an arm; the latter where it searched
ALL = "all"  # the category where no file tells any
UNCATEGORISED = "uncategorised"  # of a prompt whose file tells those of others
Cell = tuple[int, int, int]  # folder, prompt, seed, each by its place


@dataclass(frozen=True)
class Grid:
    """The images that are compared: every folder has all prompts with all seeds."""

    names: tuple[str, ...]  # of the folders, each once
    folders: tuple[Path, ...]
    prompts: tuple[str, ...]  # P
    seeds: tuple[int, ...]  # S
    categories: tuple[str, ...]  # P
    files: Mapping[Cell, Path]  # of the images
    warnings: tuple[str, ...] = ()  # what was counted otherwise than it may look

    @property
    def shape(self) -> Cell:
        """(F, P, S)."""
        return len(self.folders), len(self.prompts), len(self.seeds)


def open_grid(folders: Sequence[Path], prompts_file: Path | None = None) -> Grid:
    """Read the folders' manifests and see that they hold the same prompts and seeds.

    Raises:
        InputError: no folder, one that is no generation folder, folders of other prompts or seeds, or a prompt that the
            prompts file does not have.
    """
    if not folders:
        raise InputError("nothing to score; give --folders, each a generation folder of `dpt generate`")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a folder was given twice; give each once")
    manifests = [_picks(folder) or read_manifest(folder) for folder in folders]
    first = _cells(manifests[0])
    for folder, rows in zip(folders, manifests, strict=True):
        if different := set(_cells(rows)) ^ set(first):
            prompt, seed = sorted(different)[0]
            raise InputError(
                f"{folder} and {folders[0]} are not of the same prompts and seeds: `{prompt}` with seed {seed} is in "
                f"one of them only ({len(different)} such); generate both with the same prompts and seeds"
            )
    prompts = tuple(dict.fromkeys(prompt for prompt, _ in first))
    seeds = tuple(sorted({seed for _, seed in first}))
    if len(first) != len(prompts) * len(seeds):
        raise InputError(f"{folders[0]}: not every prompt has every seed; run the same `dpt generate` once more")
    files = {
        (f, p, s): folder / cells[prompt, seed]
        for f, (folder, cells) in enumerate(zip(folders, map(_cells, manifests), strict=True))
        for p, prompt in enumerate(prompts)
        for s, seed in enumerate(seeds)
    }
    names = tuple(short_names([str(folder) for folder in folders]))
    categories, warnings = _categories(prompts, prompts_file)
    if twice := len(manifests[0]) - len(first):
        warnings.append(f"warning: {twice} images have prompt and seed of an earlier one, and are not counted")
    if single := [name for name in dict.fromkeys(categories) if categories.count(name) == 1]:
        warnings.append(f"warning: one prompt tells no spread, so intervals are too narrow: {', '.join(single)}")
    return Grid(names, tuple(folders), prompts, seeds, categories, files, tuple(warnings))


def _picks(folder: Path) -> list[dict[str, Any]]:
    """Of an evaluation's arm that searched, the images that it picked; [] of any other folder, which holds no others.

    Raises:
        InputError: what `dpt evaluate alignment` wrote there is broken.
    """
    if not (folder / CANDIDATES).is_file():
        return []
    try:
        lines = (folder / VERDICTS).read_text(encoding="utf-8").splitlines()
        return [{key: row[key] for key in ("file", "prompt", "seed")} for row in map(json.loads, lines)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / VERDICTS} is broken ({error!r}); run the evaluation again") from error


def _cells(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], str]:
    """(prompt, seed) -> file, in the manifest's order."""
    cells: dict[tuple[str, int], str] = {}
    for row in rows:
        cells.setdefault((row["prompt"], row["seed"]), row["file"])  # a prompt that was given twice counts once
    return cells


def _categories(prompts: Sequence[str], prompts_file: Path | None) -> tuple[tuple[str, ...], list[str]]:
    """Of each prompt, and what there is to say of it."""
    if prompts_file is None:
        return (ALL,) * len(prompts), []
    known: dict[str, str] = {}
    double: dict[str, None] = {}
    for line in read_prompts_file(prompts_file):
        category = line.category or UNCATEGORISED
        if known.setdefault(line.text, category) != category:
            double[line.text] = None
    if missing := [prompt for prompt in prompts if prompt not in known]:
        raise InputError(f"prompts file {prompts_file} does not have `{missing[0]}` ({len(missing)} such)")
    if set(known.values()) == {UNCATEGORISED}:
        known = dict.fromkeys(known, ALL)
    warnings = [f"warning: {len(double)} prompts have two categories, of which the first counts"] if double else []
    return tuple(known[prompt] for prompt in prompts), warnings


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name, or as many as tell all of them apart."""
    parts = [name.rstrip("/").split("/") for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)
