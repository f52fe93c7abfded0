"""`dpt data perturb`: rule-made negatives into an imagefolder."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from dpt_t2i.config import PerturbConfig
from dpt_t2i.data.imagefolder import read_rows, write_rows
from dpt_t2i.data.perturb import RULES, perturb
from dpt_t2i.errors import InputError


def run_perturb(config: PerturbConfig) -> dict[str, Any]:
    """Add negatives behind those that a record has; done twice, nothing is added the second time.

    Raises:
        InputError: no such folder or rule, or `output_dir` exists or lies inside the folder.
    """
    unknown = sorted(set(config.rules) - set(RULES))
    if unknown:
        raise InputError(f"rule `{unknown[0]}` is unknown; there are {', '.join(RULES)}")
    rows = read_rows(config.dataset)
    counts: Counter[str] = Counter()
    for index, row in enumerate(rows):
        row["negatives"] = [*(row.get("negatives") or ()), *(added := _negatives(row, index, config))]
        counts.update(negative["rule"] for negative in added)
    captions = sum(len(row["captions"]) for row in rows)
    without = sum(not row["negatives"] for row in rows)
    write_rows(_folder(config), rows)
    result = {"records": len(rows), "captions": captions, "added": dict(counts), "records_without": without}
    lines = [f"{rule}: {counts[rule]}" for rule in RULES if counts[rule]]
    return result | {
        "summary": [
            f"{counts.total()} negatives for {captions} captions of {len(rows)} records; {without} records have none",
            *lines,
        ]
    }


def _negatives(row: dict[str, Any], index: int, config: PerturbConfig) -> list[dict[str, str]]:
    """Those of a row's captions that it does not have yet, and that are not another of its captions.

    None for a row whose negative is a picture alone: the first caption would be taken for true of that.
    """
    if row.get("negative_file") and not row.get("negatives"):
        return []
    taken = {text.casefold() for text in row["captions"]}
    taken |= {negative["caption"].casefold() for negative in row.get("negatives") or ()}
    added = []
    for caption in row["captions"]:
        for negative in perturb(caption, config.seed, index, config.rules or None)[: config.per_caption]:
            if negative.caption.casefold() not in taken:
                taken.add(negative.caption.casefold())
                added.append({"caption": negative.caption, "rule": negative.rule})
    return added


def _folder(config: PerturbConfig) -> Path:
    """Where the metadata goes; a new folder is first made a copy of the old."""
    new = config.output_dir
    if new is None:
        return config.dataset
    if new.exists():
        raise InputError(f"output_dir {new} exists; give a new folder, or none to write into {config.dataset} itself")
    if new.resolve().is_relative_to(config.dataset.resolve()):
        raise InputError(f"output_dir {new} lies inside {config.dataset}; give a place beside it")
    shutil.copytree(config.dataset, new)
    return new
