"""`dpt generate`: from its config to a generation folder."""

from __future__ import annotations

from typing import Any

from dpt_t2i.config import GenerateConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.folder import write_shared
from dpt_t2i.sampling.generate import jobs_of
from dpt_t2i.sampling.model import open_model
from dpt_t2i.sampling.prompts_file import read_prompts_file
from dpt_t2i.sampling.shares import processes


def run_generate(config: GenerateConfig) -> dict[str, Any]:
    """Make the images, or what is missing of them. Returns a summary, plain JSON; {} on any process but the main one.

    Raises:
        InputError: no prompt, a broken prompts file, seeds that cannot be read, or anything that `load_model` or the
            sampler refuses.
    """
    jobs = jobs_of(read_prompts(config), parse_seeds(config.seeds), config.own_noise)
    state = processes(config.model.device)
    model = open_model(config.model)
    decisive = model.settings(config)
    arm = arm_name(config, has_lora=decisive["lora"] is not None)
    rows = write_shared(config.output_dir, jobs, lambda missing: model.run(missing, config), decisive, arm, state)
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


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts given one by one, then those of the file.

    Raises:
        InputError: as `read_prompts_file`.
    """
    return [
        *config.prompt,
        *(line.text for line in (read_prompts_file(config.prompts_file) if config.prompts_file else ())),
    ]


def parse_seeds(text: str) -> list[int]:
    """`0`, `0,3,7` or `0-3` (both ends), in any mix; a seed given twice counts once.

    Raises:
        InputError: it is none of that.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise InputError(
                f"seeds `{text}`: `{part.strip()}` is neither a number nor a range; write `0`, `0,3,7`, `0-3`"
            )
        seeds.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    return list(dict.fromkeys(seeds))
