"""Image-text matching accuracy against hard negatives (method section 6).

Text side: one image, which of two captions is true of it? Image side: one caption, which of two images does it fit?
The candidates of an example share one noise, as in Diffusion Classifier (Li et al., ICCV 2023); a tie is never right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone, OnTruncate
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.examples import Chunk, EvalExample, chunks
from dpt_t2i.evaluation.statistics import wilson
from dpt_t2i.sampling.scoring import MatchScorer


@dataclass(frozen=True)
class ItmScores:
    """The scores of one example at one timestep; None where it has no such negative."""

    id: str
    rule: str
    timestep: int
    positive: float  # s(image, caption)
    wrong_text: float | None  # s(image, hard caption)
    wrong_image: float | None  # s(hard image, caption)
    unseen: bool = False  # the hard caption differs where the text encoder does not read, so that side is not asked

    @property
    def text_right(self) -> bool | None:
        return None if self.wrong_text is None else self.positive > self.wrong_text

    @property
    def image_right(self) -> bool | None:
        return None if self.wrong_image is None else self.positive > self.wrong_image


@dataclass(frozen=True)
class Pairs:
    """What a chunk's examples are asked: all true pairs, then images with hard captions, hard images with captions."""

    examples: Sequence[EvalExample]
    with_text: Sequence[int]  # positions of the examples that have a hard caption
    with_image: Sequence[int]  # the same of a hard image
    latents: Tensor  # [N, C, h, w] clean
    noise: Tensor  # [N, C, h, w] the example's own, whatever is shown
    text: TextStates  # N
    unseen: frozenset[int]  # of `with_text` those whose two captions are one to the text encoder

    @staticmethod
    def of(backbone: Backbone, chunk: Chunk, on_truncate: OnTruncate = "warn") -> Pairs:
        examples = chunk.examples
        with_text = [i for i, e in enumerate(examples) if e.hard_caption is not None]
        with_image = [i for i, e in enumerate(examples) if e.hard_pixels is not None]
        hard_pixels = [e.hard_pixels for e in examples if e.hard_pixels is not None]
        parts = [chunk.latents, chunk.latents[with_text]]
        if hard_pixels:
            parts.append(backbone.encode_image(torch.stack(hard_pixels).to(backbone.device)))
        captions = [e.caption for e in examples]
        texts = captions + [str(examples[i].hard_caption) for i in with_text] + [captions[i] for i in with_image]
        noise = torch.cat([chunk.noise, chunk.noise[with_text], chunk.noise[with_image]])
        states = backbone.encode_text(texts, on_truncate)
        own = torch.tensor(with_text, dtype=torch.long, device=states.tokens.device)
        hard = torch.arange(len(examples), len(examples) + len(with_text), device=own.device)
        unseen = frozenset(own[states.alike(own, hard)].tolist())
        return Pairs(examples, with_text, with_image, torch.cat(parts), noise, states, unseen)

    def noised(self, backbone: Backbone, timestep: int) -> tuple[Tensor, Tensor]:
        """z_t `[N, C, h, w]` and t `[N]`."""
        steps = torch.full((len(self.latents),), timestep, device=self.latents.device)
        return backbone.add_noise(self.latents, self.noise, steps), steps

    def judged(self, scores: Tensor, timestep: int) -> list[ItmScores]:
        """The examples with their scores `[N]`.

        Raises:
            InputError: a score is NaN or infinite (names the example).
        """
        scores, examples = scores.float().cpu(), self.examples
        owners = [*range(len(examples)), *self.with_text, *self.with_image]
        _refuse_nan(scores, owners, examples, timestep)
        positive, wrong_text, wrong_image = scores.split([len(examples), len(self.with_text), len(self.with_image)])
        by_text = dict(zip(self.with_text, wrong_text.tolist(), strict=True))
        by_image = dict(zip(self.with_image, wrong_image.tolist(), strict=True))
        return [
            ItmScores(
                e.id,
                e.rule,
                timestep,
                float(positive[i]),
                None if i in self.unseen else by_text.get(i),
                by_image.get(i),
                i in self.unseen,
            )
            for i, e in enumerate(examples)
        ]


@torch.no_grad()
def itm_scores(
    scorer: MatchScorer,
    examples: Iterable[EvalExample],
    timesteps: Sequence[int],
    *,
    seed: int = 0,
    batch_size: int = 32,
    first: int = 0,
    on_truncate: OnTruncate = "warn",
) -> list[ItmScores]:
    """Score every example with its caption and its hard negatives at every timestep.

    Args:
        seed: of the noise; that of an example follows from (seed, its number).
        batch_size: examples at once (three rows each); changes no score.
        first: number of the first example, where these are a part of all.
        on_truncate: what happens to a caption over the token limit.

    Raises:
        InputError: a score is NaN or infinite (names the example).
    """
    rows: list[ItmScores] = []
    for chunk in chunks(scorer.backbone, examples, batch_size, seed, first):
        pairs = Pairs.of(scorer.backbone, chunk, on_truncate)
        for timestep in timesteps:
            noisy, steps = pairs.noised(scorer.backbone, timestep)
            rows.extend(pairs.judged(scorer(noisy, steps, pairs.text), timestep))
    return rows


def itm_summary(rows: Sequence[ItmScores]) -> dict[str, Any]:
    """Accuracies by timestep: `text`, `image`, `both` (both sides of an example right), each with `count` and a 95 %
    Wilson interval `low`, `high`; under `rules` the text side for each way in which hard captions were made; and as
    `unseen` how many hard captions were not asked for, since the text encoder reads them as the true one."""
    return {
        str(timestep): _accuracies([row for row in rows if row.timestep == timestep])
        for timestep in dict.fromkeys(row.timestep for row in rows)
    }


def share(outcomes: Sequence[bool | None]) -> dict[str, float | int] | None:
    """`accuracy low high count` of those that are not None; None if there is none."""
    known = [outcome for outcome in outcomes if outcome is not None]
    if not known:
        return None
    low, high = wilson(sum(known), len(known))
    return {"accuracy": sum(known) / len(known), "low": low, "high": high, "count": len(known)}


def _accuracies(rows: Sequence[ItmScores]) -> dict[str, Any]:
    sides = {
        "text": share([row.text_right for row in rows]),
        "image": share([row.image_right for row in rows]),
        "both": share([_both(row) for row in rows]),
    }
    names = sorted({row.rule for row in rows})
    rules = {name: share([row.text_right for row in rows if row.rule == name]) for name in names}
    found: dict[str, Any] = {name: side for name, side in sides.items() if side is not None}
    found |= {"unseen": unseen} if (unseen := sum(row.unseen for row in rows)) else {}
    return found | {"rules": {name: rule for name, rule in rules.items() if rule is not None}}


def _both(row: ItmScores) -> bool | None:
    if row.text_right is None or row.image_right is None:
        return None
    return row.text_right and row.image_right


def _refuse_nan(scores: Tensor, owners: Sequence[int], examples: Sequence[EvalExample], timestep: int) -> None:
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        where = f"example `{examples[owners[bad[0]]].id}` at timestep {timestep}"
        raise InputError(f"the matching score of {where} is NaN or infinite; use dtype float32")
