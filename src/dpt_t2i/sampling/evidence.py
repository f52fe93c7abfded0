"""What the grounding head saw: which words of the prompt it found in the image, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dpt_t2i.adapter.postprocess import rank_boxes
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.boxes import clip_xyxy, iou_xyxy

SAME_BOX_IOU = 0.5  # two boxes of one phrase that overlap more are one finding


@dataclass(frozen=True)
class PhraseBox:
    """One thing that the prompt names and the adapter found."""

    phrase: str
    span: tuple[int, int]  # characters [start, end) of the prompt
    box: tuple[float, float, float, float]  # xyxy in pixels
    confidence: float  # in [0, 1]: that this is any named object at all


def phrase_boxes(
    output: AdapterOutput, offsets: Sequence[tuple[int, int]], prompt: str, width: int, height: int, least: float = 0.5
) -> tuple[PhraseBox, ...]:
    """Findings of confidence `least` and more in the first example of `output`, best first.

    Args:
        offsets: characters of each token position of `prompt`, as the adapter was trained on them.
        width, height: pixels of the image that the denoiser saw.
    """
    ranked = rank_boxes(output, [(width, height)] * len(output.boxes))[0]
    words = output.logits[0].float().softmax(dim=-1)[:, : len(offsets)].cpu()  # [Q_g, L] share of each token
    boxes = clip_xyxy(ranked.boxes, width, height)
    found: list[PhraseBox] = []
    for box, score, query in zip(boxes, ranked.scores.tolist(), ranked.queries.tolist(), strict=True):
        span = _span(words[query], offsets)
        rivals = [other for other in found if other.span == span]
        if score < least or span is None or any(_overlap(box, other) > SAME_BOX_IOU for other in rivals):
            continue
        left, top, right, bottom = box.tolist()
        found.append(PhraseBox(prompt[span[0] : span[1]], span, (left, top, right, bottom), score))
    return tuple(found)


def _span(words: Tensor, offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Characters of the run of tokens around the likeliest one that are at least half as likely."""
    best = int(words.argmax())
    named = [share >= 0.5 * words[best] and end > start for share, (start, end) in zip(words, offsets, strict=False)]
    if not named[best]:
        return None
    first = last = best
    while first > 0 and named[first - 1]:
        first -= 1
    while last + 1 < len(named) and named[last + 1]:
        last += 1
    return offsets[first][0], offsets[last][1]


def _overlap(box: Tensor, other: PhraseBox) -> float:
    return float(iou_xyxy(box[None], box.new_tensor([other.box])))
