"""`dpt generate`: from its config to a generation folder."""

from __future__ import annotations

import logging
from typing import Any

from dpt_t2i.config import CorrectionConfig, GenerateConfig, SampleConfig
from dpt_t2i.sampling.folder import write_shared
from dpt_t2i.sampling.generate import jobs_of, parse_seeds
from dpt_t2i.sampling.model import open_model
from dpt_t2i.sampling.progress import watched
from dpt_t2i.sampling.prompts_file import read_prompts_file
from dpt_t2i.sampling.shares import processes

log = logging.getLogger(__name__)


def run_generate(config: GenerateConfig) -> dict[str, Any]:
    """Make the images, or what is missing of them. Returns a summary, plain JSON; {} on any process but the main one.

    Raises:
        InputError: no prompt, a broken prompts file, seeds that cannot be read, or anything that `load_model` or the
            sampler refuses.
    """
    jobs = jobs_of(read_prompts(config), parse_seeds(config.seeds), config.own_noise)
    _tell_idle(config.correction)
    _tell_unguided(config.sample)
    state = processes(config.model.device)
    model = open_model(config.model)
    decisive = model.settings(config)
    arm = arm_name(config, has_lora=decisive["lora"] is not None)
    make = watched(model, config, arm, state.is_main_process)
    rows = write_shared(config.output_dir, jobs, make, decisive, arm, state)
    if not state.is_main_process:
        return {}
    scores = [row["score"] for row in rows if row["score"] is not None]
    return {
        "images": len(rows),
        "mean_score": sum(scores) / len(scores) if scores else None,
        "output_dir": str(config.output_dir),
        "files": [row["file"] for row in rows],
    }


def arm_name(config: GenerateConfig, has_lora: bool) -> str:
    """What a comparison calls this way of generating: `base`, `tuned+correct`, `judge+best_of_4`, ..."""
    parts = ["tuned" if config.sample.lora_draws else "judge"] if has_lora else ["base"]
    if config.correction.correct > 0:
        parts.append("correct")
    if config.search.best_of > 1:
        parts.append(f"best_of_{config.search.best_of}")
    return "+".join(parts)


def _tell_idle(correction: CorrectionConfig) -> None:
    """Settings of a correction that does not take place."""
    plain = CorrectionConfig()
    idle = [name for name, value in correction if value != getattr(plain, name)]
    if correction.correct == 0 and idle:
        log.warning("`%s` is set, but `correct` is 0, so nothing is corrected; give --correct too", idle[0])


def _tell_unguided(sample: SampleConfig) -> None:
    """A negative prompt stands in the unconditional branch, which there is with guidance alone."""
    if sample.negative_prompt and sample.guidance_scale is not None and sample.guidance_scale <= 1:
        log.warning("negative_prompt changes nothing at guidance_scale %g; give more than 1", sample.guidance_scale)


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts given one by one, then those of the file.

    Raises:
        InputError: as `read_prompts_file`.
    """
    return [
        *config.prompt,
        *(line.text for line in (read_prompts_file(config.prompts_file) if config.prompts_file else ())),
    ]
