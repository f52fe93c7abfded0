"""Which words of a prompt name a thing."""

import numpy as np
import pytest

from dpt_t2i.sampling.phrases import split_phrases
from dpt_t2i.scenes.language import CATEGORIES, caption, dress
from dpt_t2i.scenes.plans import draw_plan


@pytest.mark.parametrize(
    "prompt, phrases",
    [
        ("a photo of two red circles left of a star", ["red circles", "star"]),
        ("an amber plus sign on the right side of the box, and a disc", ["amber plus sign", "box", "disc"]),
        ("A dog sleeping under an old wooden table", ["dog sleeping", "old wooden table"]),
        ("exactly 3 tiny stars", ["tiny stars"]),
        ("the", ["the"]),
        ("  scarlet fog ", ["scarlet fog"]),
        ("a left glove and a handbag", ["left glove", "handbag"]),
    ],
)
def test_phrases(prompt: str, phrases: list[str]) -> None:
    found = split_phrases(prompt)
    assert [phrase.text for phrase in found] == phrases
    assert [prompt[slice(*phrase.span)] for phrase in found] == phrases


def test_every_caption_of_the_drawn_world_is_split_where_it_was_joined() -> None:
    rng = np.random.default_rng(0)
    for category in CATEGORIES:
        for _ in range(60):
            told = caption(dress(draw_plan(category, rng, held_out=False), rng))
            assert tuple(phrase.span for phrase in split_phrases(told.text)) == told.spans, told.text
