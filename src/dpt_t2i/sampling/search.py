"""Search over seeds with the model's own score: make N images, keep the one that it thinks obeys best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.correct import Scorer
from dpt_t2i.sampling.generate import Generated, Job, generate
from dpt_t2i.sampling.loop import Step
from dpt_t2i.sampling.scoring import Judge

CANDIDATE_STRIDE = 1_000_000  # candidates of neighbouring seeds never meet


@dataclass(frozen=True)
class SearchResult:
    """The chosen image, and what all candidates scored."""

    best: Generated
    scores: Mapping[int, float]  # noise seed -> score, in the order in which they were tried


def candidate_seeds(seed: int, count: int) -> list[int]:
    """Noise seeds tried for `seed`; the first is the seed itself, so that best-of-1 is plain generation."""
    return [seed + CANDIDATE_STRIDE * k for k in range(count)]


def best_seed(scores: Mapping[int, float]) -> int:
    """The seed with the highest score; of several, the lowest. Raises `InputError` on NaN, which is no score."""
    bad = [seed for seed, score in scores.items() if math.isnan(score)]
    if bad:
        raise InputError(f"the score of seed {bad[0]} is NaN; nothing can be ranked")
    return min(scores, key=lambda seed: (-scores[seed], seed))


def best_of(
    backbone: Backbone,
    jobs: Sequence[Job],
    count: int,
    judge: Judge,
    settings: SampleConfig,
    correction: CorrectionConfig | None = None,
    scorer: Scorer | None = None,
    height: int | None = None,
    width: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[SearchResult]:
    """For each job the best of `count` candidates by `judge`, in order; the other arguments are `generate`'s."""
    candidates = [replace(job, noise_seed=seed) for job in jobs for seed in candidate_seeds(job.noise_seed, count)]
    images = generate(backbone, candidates, settings, correction, scorer, judge, height, width, on_step)
    for _ in jobs:
        tried = {image.job.noise_seed: image for image in (next(images) for _ in range(count))}
        scores = {seed: float("nan") if image.score is None else image.score for seed, image in tried.items()}
        yield SearchResult(tried[best_seed(scores)], scores)
