"""How well one image obeys one prompt, and what speaks for each thing that the prompt names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dpt_t2i.adapter.postprocess import grounding_scores
from dpt_t2i.adapter.score import match_score
from dpt_t2i.boxes import clip_xyxy, cxcywh_to_xyxy
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.annotate import Mark
from dpt_t2i.sampling.generate import check_text
from dpt_t2i.sampling.images import letterbox
from dpt_t2i.sampling.noise import shared_noise
from dpt_t2i.sampling.phrases import split_phrases
from dpt_t2i.sampling.scoring import MatchScorer


@dataclass(frozen=True)
class Evidence:
    """What speaks for one thing that a prompt names."""

    phrase: str
    span: tuple[int, int]  # characters of the prompt
    box: tuple[float, float, float, float]  # xyxy in pixels of the picture
    confidence: float  # in [0, 1]: probability that the grounding query puts on the words of the phrase
    score: float  # matching score of the picture with the phrase alone


@dataclass(frozen=True)
class Judgement:
    """The matching score of a picture with a whole prompt, and the evidence for its parts."""

    score: float  # in [-1, 1]; compare it between pictures or prompts, its zero means nothing
    phrases: tuple[Evidence, ...]

    def marks(self) -> list[Mark]:
        """The evidence as boxes to be drawn."""
        return [Mark(e.box, f"{e.phrase} {e.confidence:.2f}") for e in self.phrases]


@torch.no_grad()
def judge_image(
    scorer: MatchScorer, image: Image.Image, prompt: str, timestep: int, draws: int, seed: int
) -> Judgement:
    """Score a picture of any size against a prompt.

    Each phrase is read alone, as "the red circle": a referring expression is what the grounding queries learned from,
    and a whole prompt would leave the words of its second thing without a query.

    Args:
        timestep: noise level at which the picture is judged.
        draws: fixed noises over which scores, confidences and boxes are averaged.

    Raises:
        InputError: the prompt is empty or no text, the timestep is outside the schedule, or a score is NaN.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty; write what the image should show")
    check_text(prompt)
    backbone = scorer.backbone
    height, width = backbone.image_size
    pixels, placement = letterbox(image, height, width)
    latents = backbone.encode_image(pixels.to(backbone.device))
    score = scorer.score_images(latents, backbone.encode_text([prompt]), timestep, draws, seed)
    evidence = []
    for phrase in split_phrases(prompt):
        box, confidence, alone = _read(scorer, latents, f"the {phrase.text}", timestep, draws, seed)
        in_canvas = box * box.new_tensor([width, height, width, height])
        in_picture = clip_xyxy(placement.to_picture(in_canvas), *image.size)
        left, top, right, bottom = in_picture.tolist()
        evidence.append(Evidence(phrase.text, phrase.span, (left, top, right, bottom), confidence, alone))
    return Judgement(float(score[0]), tuple(evidence))


def _read(
    scorer: MatchScorer, latents: Tensor, expression: str, timestep: int, draws: int, seed: int
) -> tuple[Tensor, float, float]:
    """The best query's box `[4]` (xyxy in [0, 1]), its confidence, and the matching score; means over the draws."""
    backbone = scorer.backbone
    noise = torch.stack([shared_noise(seed, draw, latents.shape[1:]) for draw in range(draws)]).to(latents)
    steps = torch.full((draws,), timestep, device=latents.device)
    text = backbone.encode_text([expression]).select(torch.zeros(draws, dtype=torch.long, device=latents.device))
    output = scorer.read(backbone.add_noise(latents.expand_as(noise), noise, steps), steps, text)
    confidence = grounding_scores(output.logits).mean(dim=0)  # [Q_g]
    best = int(confidence.argmax())
    box = cxcywh_to_xyxy(output.boxes[:, best].mean(dim=0)).cpu()
    alone = match_score(output, text.pooled).mean()
    _refuse_nan([box, confidence, alone], expression)
    return box, float(confidence[best]), float(alone)


def _refuse_nan(values: Sequence[Tensor], expression: str) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise InputError(f"the evidence for `{expression}` is NaN; use dtype float32")
