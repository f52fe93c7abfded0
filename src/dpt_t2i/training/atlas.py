"""Held-out figures of a run with an adapter at each tap: a few while it learns, the whole atlas at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from accelerate import PartialState

from dpt_t2i.config import ProbeConfig
from dpt_t2i.evaluation.atlas import SHARES, TapReaders, atlas_cells, best_cells, buckets, tap_ranks, tap_scores
from dpt_t2i.evaluation.provenance import command_line, versions
from dpt_t2i.sampling.shares import gathered
from dpt_t2i.training.setup import Setup
from dpt_t2i.training.validation import TIMESTEP, eval_mode

ATLAS = "atlas.json"
WORDS = {"itm_text": "ITM, text side", "itm_image": "ITM, image side", "rec_p1": "REC, P@1"}


class AtlasValidation:
    """Calling it gives the shares of `SHARES` at the paper's timestep: `itm_text`, the mean over the taps, and
    `itm_text_TAP` of each, and so on; those that exist.

    Args:
        setups: tap name -> setup with its adapter; all else is shared.

    Raises:
        InputError: more buckets are asked for than there are timesteps.
    """

    def __init__(self, config: ProbeConfig, setups: Mapping[str, Setup]) -> None:
        shared = next(iter(setups.values()))
        self.config, self.held_out = config, shared.validation
        self.buckets = buckets(config.train.min_timestep, config.train.max_timestep, config.atlas.timestep_buckets)
        self.readers = TapReaders(
            shared.backbone,
            tuple(tap for setup in setups.values() for tap in setup.taps),
            {name: setup.adapter for name, setup in setups.items()},
        )

    def __call__(self) -> dict[str, float]:
        cells = self._cells([TIMESTEP])
        figures: dict[str, float] = {}
        for name in SHARES:
            own = {tap: cell[name]["accuracy"] for tap, row in cells.items() for cell in row.values() if name in cell}
            if own:
                figures |= {name: fmean(own.values())} | {f"{name}_{tap}": value for tap, value in own.items()}
        return figures

    def atlas(self) -> dict[str, Any]:
        """All that `atlas.json` holds; see `atlas_cells`."""
        cells = self._cells([bucket.middle for bucket in self.buckets])
        return {
            "base": self.readers.backbone.name,
            "examples": len(self.held_out.records),
            "taps": {tap.name: asdict(tap) for tap in self.readers.taps},
            "buckets": [asdict(bucket) for bucket in self.buckets],
            "cells": cells,
            "best": best_cells(cells),
            "settings": self.config.model_dump(mode="json"),
            "command": command_line(),
            "versions": versions(),
        }

    def _cells(self, timesteps: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
        readers, mine, state = self.readers, self.held_out.examples, PartialState()
        for adapter in readers.adapters.values():
            adapter.eval()
        with eval_mode(readers.backbone.denoiser):
            scores = list(tap_scores(readers, mine, timesteps, batch_size=self.held_out.batch_size))
            ranks = list(tap_ranks(readers, mine, timesteps, batch_size=self.held_out.batch_size))
        scales = {tap: float(adapter.logit_scale.detach().exp()) for tap, adapter in readers.adapters.items()}
        return atlas_cells(gathered(scores, state), gathered(ranks, state), scales)


def atlas_lines(atlas: Mapping[str, Any]) -> list[str]:
    """The atlas as tables of percent, taps by timesteps, and where each figure is best."""
    lines = [f"right of {atlas['examples']} held-out examples, percent, by tap and timestep"]
    for name in atlas["best"]:
        lines += ["", *_table(WORDS[name], name, atlas)]
    lines.append("")
    for name, best in atlas["best"].items():
        lines.append(f"best {WORDS[name]}: {100 * best['accuracy']:.1f} % at {best['tap']}, t = {best['timestep']}")
    return lines


def _table(title: str, name: str, atlas: Mapping[str, Any]) -> Iterator[str]:
    width = max(len(title), *(len(tap) for tap in atlas["cells"]))
    timesteps = [str(bucket["middle"]) for bucket in atlas["buckets"]]
    yield f"{title:<{width}}" + "".join(f"{timestep:>7}" for timestep in timesteps)
    for tap, row in atlas["cells"].items():
        shown = [f"{100 * row[timestep][name]['accuracy']:7.1f}" for timestep in timesteps]
        yield f"{tap:<{width}}" + "".join(shown)
