"""How far a run is, for eyes: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta

from tqdm.auto import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Counts steps and measures speed; validation and samples stop its clock.

    Args:
        total, first: optimiser steps of the run, and those done before.
        examples_a_step: over all processes.
        shown: False on all processes but the first of each machine.
    """

    def __init__(self, total: int, first: int, examples_a_step: int, shown: bool) -> None:
        self.total, self.examples_a_step, self.shown = total, examples_a_step, shown
        self.bar = tqdm(total=total, initial=first, desc="train", disable=None if shown else True)
        self.restart(first)

    def restart(self, step: int) -> None:
        """Measure speed from this step on."""
        self.clock, self.since = time.perf_counter(), step

    def images_per_s(self, step: int) -> float:
        return (step - self.since) * self.examples_a_step / (time.perf_counter() - self.clock)

    def show(self, step: int, row: Mapping[str, float]) -> None:
        """`row`: loss terms, `lr`, `images_per_s`; also starts the clock anew."""
        text = describe(row)
        if not self.bar.disable:
            self.bar.set_postfix_str(text)  # the bar itself tells step and ETA
        elif self.shown:
            left = (self.total - step) * self.examples_a_step / max(row["images_per_s"], 1e-9)
            log.info("step %d/%d  %s  ETA %s", step, self.total, text, timedelta(seconds=round(left)))
        self.restart(step)


def describe(row: Mapping[str, float]) -> str:
    """`loss 2.310 (i2t 0.512 mse 0.081)  lr 1.0e-04  12.3 images/s`, with the skipped steps where there are any."""
    terms = " ".join(f"{name[5:]} {value:.3f}" for name, value in row.items() if name.startswith("loss_"))
    skipped = f"  {row['skipped']:.0f} steps skipped" if row.get("skipped") else ""
    return f"loss {row['loss']:.3f} ({terms})  lr {row['lr']:.1e}  {row['images_per_s']:.1f} images/s{skipped}"
