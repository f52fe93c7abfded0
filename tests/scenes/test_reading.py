"""Captions read back against the facts that they were written from."""

import pytest

from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.facts import Fact, Phrase
from dpt_t2i.scenes.reading import read_facts


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_caption_is_read_as_it_was_meant(split):
    for index in range(200):
        caption = make_example(index, seed=3, split=split).caption
        assert read_facts(caption.text) == caption.facts, caption.text


def test_a_word_from_outside_the_world_is_kept_and_matches_nothing():
    assert read_facts("a tiny pink disc") == (Fact("exists", Phrase("pink disc", size="small")),)
    assert read_facts("exactly five boxes") == (Fact("count", Phrase("square"), count=5),)


def test_another_build_is_refused():
    with pytest.raises(ValueError, match="article"):
        read_facts("circles everywhere")
