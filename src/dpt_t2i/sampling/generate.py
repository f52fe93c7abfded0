"""Seeded generation: an image depends on the weights, its prompt, its seed and the settings, and on nothing else.

Batches share nothing: each image has its own generator on the CPU, each text is encoded alone, padded to the full
length. What is left between batch sizes is the rounding of the kernels (about 1e-6 of a latent). A correction would
enlarge it, thousands of times in a step, so corrected images are drawn one at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import GUIDANCE, TextStates
from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.correct import Scorer
from dpt_t2i.sampling.images import to_pil
from dpt_t2i.sampling.loop import Step, sample
from dpt_t2i.sampling.noise import seeded
from dpt_t2i.sampling.scoring import Judge

MOST_SEEDS = 1_000_000  # of a range


@dataclass(frozen=True)
class Job:
    """One image to be made."""

    prompt_index: int
    prompt: str
    seed: int  # what the user asked for and the file is named by
    noise_seed: int  # of the initial noise: `seed`, or the candidate of a search


@dataclass(frozen=True)
class Generated:
    """One image that was made."""

    job: Job
    image: Image.Image
    latents: Tensor  # [C, h, w] final latents, float32 on the CPU
    score: float | None  # matching score of the final latents, None without a judge


def noise_seed(prompt: str, seed: int, own_noise: bool) -> int:
    """The noise that a seed stands for: one for all prompts, or with `own_noise` another one for each."""
    return seed + (zlib.crc32(prompt.encode()) << 30 if own_noise else 0)


def jobs_of(prompts: Sequence[str], seeds: Sequence[int], own_noise: bool = False) -> list[Job]:
    """Every prompt with every seed, prompt by prompt.

    Raises:
        InputError: no prompt, no seed, a negative one or one of over 32 bits, or a prompt that is no text.
    """
    if not prompts or not seeds:
        raise InputError("nothing to generate: give at least one prompt and one seed")
    if min(seeds) < 0:
        raise InputError(f"seed {min(seeds)} is negative; seeds are 0 or more")
    if max(seeds) >= 2**32:
        raise InputError(f"seed {max(seeds)} is too large; seeds are below 2^32")
    for prompt in prompts:
        check_text(prompt)
    return [
        Job(index, prompt, seed, noise_seed(prompt, seed, own_noise))
        for index, prompt in enumerate(prompts)
        for seed in seeds
    ]


def check_text(prompt: str) -> None:
    """Raises `InputError` where a prompt holds bytes, or half a character, that no tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise InputError(f"prompt {prompt!r} is no text; give it in UTF-8")


def parse_seeds(text: str) -> list[int]:
    """`0`, `0,3,7` or `0-3` (both ends), in any mix; a seed given twice counts once.

    Raises:
        InputError: it is none of that, or one of over 32 bits.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise InputError(
                f"seeds `{text}`: `{part.strip()}` is neither a number nor a range; write `0`, `0,3,7`, `0-3`"
            )
        if max(int(first), int(last or 0)) >= 2**32 or int(last or first) - int(first) >= MOST_SEEDS:
            raise InputError(f"seeds `{text}`: they are below 2^32, and at most {MOST_SEEDS} in a range")
        seeds.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    return list(dict.fromkeys(seeds))


def generate(
    backbone: Backbone,
    jobs: Sequence[Job],
    settings: SampleConfig,
    correction: CorrectionConfig | None = None,
    scorer: Scorer | None = None,
    judge: Judge | None = None,
    height: int | None = None,
    width: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[Generated]:
    """Make the images of `jobs`, in order, `settings.batch_size` at a time, or each alone where they are corrected.

    Args:
        correction: None = off.
        scorer: what the correction climbs.
        judge: scores the finished latents; None leaves `score` empty.
        height, width: pixels; default the model's own.
        on_step: is told of every sampling step of every batch.

    Raises:
        InputError: a size that the VAE cannot give, a negative prompt where guidance is distilled into the denoiser, or
            an image with NaN (names prompt and seed).
    """
    shape = latent_shape(backbone, height, width)
    correction = correction or CorrectionConfig()
    negative = backbone.encode_text([settings.negative_prompt])
    if settings.negative_prompt and GUIDANCE in negative.extras:
        raise InputError(f"base `{backbone.name}` has no unconditional branch; leave negative_prompt out")
    texts: dict[str, TextStates] = {}
    at_once = 1 if correction.correct > 0 else settings.batch_size
    for start in range(0, len(jobs), at_once):
        batch = jobs[start : start + at_once]
        # Only this batch's texts are kept: a suite of 30 000 prompts would fill the memory.
        texts = {job.prompt: texts.get(job.prompt) or backbone.encode_text([job.prompt]) for job in batch}
        text = TextStates.cat([texts[job.prompt] for job in batch])
        null = negative.select(torch.zeros(len(batch), dtype=torch.long, device=backbone.device))
        generators = [seeded(job.noise_seed) for job in batch]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents = sample(backbone, text, null, noise, settings, correction, scorer, on_step, generators)
        with torch.no_grad():
            pixels = backbone.decode_image(latents)
        _check_finite(batch, latents, pixels)
        scores = [None] * len(batch) if judge is None else judge(latents, text).tolist()
        for job, image, latent, score in zip(batch, to_pil(pixels), latents.cpu(), scores, strict=True):
            yield Generated(job, image, latent, score)


def latent_shape(backbone: Backbone, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(C, h, w) of an image's latents. Raises `InputError` where a side is no multiple of the VAE's scale."""
    sides = tuple(own if side is None else side for side, own in zip((height, width), backbone.image_size, strict=True))
    for name, side in zip(("height", "width"), sides, strict=True):
        if side <= 0 or side % backbone.vae_scale:
            raise InputError(f"{name} {side} must be a positive multiple of {backbone.vae_scale}")
    return backbone.latent_channels, sides[0] // backbone.vae_scale, sides[1] // backbone.vae_scale


def _check_finite(batch: Sequence[Job], latents: Tensor, pixels: Tensor) -> None:
    finite = torch.isfinite(latents).flatten(1).all(1) & torch.isfinite(pixels).flatten(1).all(1)
    for job, ok in zip(batch, finite.tolist(), strict=True):
        if not ok:
            raise InputError(
                f"the image of prompt `{job.prompt}` with seed {job.noise_seed} is NaN; lower the correction or the "
                "guidance, or use dtype float32"
            )
