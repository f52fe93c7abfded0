"""Which prompts are used, and their numbers."""

from collections import Counter

import pytest

from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.suites import open_suite
from dpt_t2i.scenes.prompts import load_suite


def test_the_whole_suite_in_its_order() -> None:
    whole = open_suite("dev")
    assert [p.index for p in whole] == list(range(300))
    assert [p.prompt for p in whole] == load_suite("dev")


def test_a_part_takes_from_every_category_in_turn_and_keeps_the_numbers() -> None:
    whole = {p.index: p for p in open_suite("dev")}
    part = open_suite("dev", 8)
    counts = Counter(p.prompt.category for p in part)
    assert len(counts) == 6 and sorted(counts.values()) == [1, 1, 1, 1, 2, 2]
    assert all(whole[p.index] == p for p in part)
    assert [p.index for p in part] == sorted(p.index for p in part)
    assert {p.index for p in part} < {p.index for p in open_suite("dev", 20)}  # a larger part holds a smaller one


def test_more_than_there_are_is_the_whole() -> None:
    assert open_suite("test_heldout", 10_000) == open_suite("test_heldout")


def test_an_unknown_suite() -> None:
    with pytest.raises(InputError, match="unknown prompt suite `coco`"):
        open_suite("coco")
