"""What a recipe hands to the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.training.windows import Feed


@dataclass(frozen=True)
class Job:
    """A training to be done: what learns, from what, and what is kept of it."""

    objective: nn.Module  # forward(Encoded, Draw, num_boxes) -> loss terms
    weights: Mapping[str, float]
    feed: Feed
    output_dir: Path
    save_artifacts: Callable[[Path], None]
    load_artifacts: Callable[[Path], None]  # put a checkpoint's weights back in place
    validate: Callable[[], dict[str, float]]
    after_step: Callable[[], None] | None = None  # keeps parameters inside their bounds, and their averages
    sample: Callable[[int], dict[str, float]] | None = None  # draws and keeps samples; on the main process only
    sample_every: int = 0  # optimiser steps; 0 = never
    clipped_apart: Sequence[nn.Module] = ()  # parts of the objective whose gradients are clipped each by its own norm
    backbone: Backbone | None = None  # whose frozen weights FSDP may share out; None = nothing is frozen
    begin: Callable[[], None] | None = None  # once a checkpoint to go on from is known to fit; on the main process only
    at_end: Callable[[], None] | None = None  # measures what came of it, on every process, after the last step
