"""Making the images of an arm: resumed image by image, and shared out between processes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from dpt_t2i.config import GenerateConfig
from dpt_t2i.evaluation.suites import NumberedPrompt
from dpt_t2i.sampling.folder import image_file, write_shared
from dpt_t2i.sampling.generate import Job, noise_seed
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.sampling.progress import watched
from dpt_t2i.sampling.search import candidate_seeds


def jobs_of_arm(
    prompts: Sequence[NumberedPrompt], seeds: Sequence[int], best_of: int, own_noise: bool = True
) -> list[Job]:
    """Every candidate as an image of its own, named by its seed."""
    return [
        Job(p.index, p.prompt.text, candidate, noise_seed(p.prompt.text, candidate, own_noise))
        for p in prompts
        for seed in seeds
        for candidate in candidate_seeds(seed, best_of)
    ]


def make_images(
    folder: Path, jobs: Sequence[Job], model: T2IModel, settings: GenerateConfig, arm: str, state: PartialState
) -> list[dict[str, Any]]:
    """A generation folder with all `jobs`; the manifest's rows on the main process, nothing on the others."""
    make = watched(model, settings, arm, state.is_main_process)
    return write_shared(folder, jobs, make, model.settings(settings), arm, state)


def borrow_images(folder: Path, source: Path, jobs: Sequence[Job]) -> None:
    """Copy images that another arm has made already. Each carries its settings, so a wrong one is made again."""
    for job in jobs:
        have, want = source / image_file(job), folder / image_file(job)
        if have.is_file() and not want.exists():
            want.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(have, want)
