"""Naming what stands on which side: the help that the contrastive training of text and image encoder needs.

A caption and its flipped twin differ in a side alone, and contrast by itself learns it late: both encoders must tell
sides before either gains by it. So both also name, by one linear layer on their embeddings that is thrown away
afterwards, what a caption with a side says of left, right, above and below: of the other axis, that it says nothing.
Without that "left of" and "above" are named alike, and become one.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from dpt_t2i.scenes.reading import read_facts
from dpt_t2i.scenes.world import COLORS, OPPOSITE, RELATIONS, SHAPES

NOTHING = len(SHAPES)  # the name that stands for no shape
NAMES = len(RELATIONS) * (len(SHAPES) + 1 + len(COLORS))  # logits of one embedding


def slots_of(captions: np.ndarray) -> np.ndarray:
    """Captions [N, 2] -> [N, 2, 4, 2]: shape and colour that each names to the left, right, above and below.

    NOTHING is the shape on a side that the caption leaves out; -1 is what is not asked: an open colour, and all of a
    caption without a side.
    """
    found = np.full((*captions.shape, len(RELATIONS), 2), -1, dtype=np.int64)
    colors = list(COLORS)
    for place, text in np.ndenumerate(captions):
        for fact in read_facts(str(text)):
            if fact.relation is None or fact.other is None:
                continue
            found[(*place, slice(None), 0)] = NOTHING
            for phrase, side in ((fact.phrase, fact.relation), (fact.other, OPPOSITE[fact.relation])):
                color = -1 if phrase.color is None else colors.index(phrase.color)
                found[(*place, RELATIONS.index(side))] = SHAPES.index(phrase.shape), color
    return found


def naming(logits: Tensor, slots: Tensor) -> Tensor:
    """Cross-entropy of the named shapes and colours; logits [B, 4 (5 + 8)], slots [B, 4, 2]. Nothing named: 0."""
    shapes, colors = logits.unflatten(-1, (len(RELATIONS), -1)).split([len(SHAPES) + 1, len(COLORS)], dim=-1)
    return _mean(shapes, slots[..., 0]) + _mean(colors, slots[..., 1])


def _mean(logits: Tensor, names: Tensor) -> Tensor:
    total = F.cross_entropy(logits.flatten(0, 1), names.flatten(), ignore_index=-1, reduction="sum")
    return total / (names != -1).sum().clamp(min=1)
