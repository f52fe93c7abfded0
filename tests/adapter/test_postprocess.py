"""Scores and order of grounded boxes."""

import pytest
import torch

from dpt_t2i.adapter.postprocess import grounding_scores, rank_boxes
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.errors import InputError


def output_with(no_object: list[float], boxes: list[list[float]]) -> AdapterOutput:
    logits = torch.zeros(1, len(no_object), 3)
    logits[0, :, -1] = torch.tensor(no_object)
    return AdapterOutput(torch.empty(0), logits, torch.tensor([boxes]), torch.empty(0), None, torch.ones([]))


def test_score_is_one_minus_no_object() -> None:
    assert grounding_scores(torch.tensor([0.0, 0.0, 0.0])).item() == pytest.approx(2 / 3)
    assert grounding_scores(torch.tensor([0.0, 0.0, 50.0])).item() == pytest.approx(0.0)


def test_best_first_in_pixels_of_a_wide_image() -> None:
    boxes = [[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]
    ranked = rank_boxes(output_with([1.0, 0.0], boxes), [(200, 100)])[0]
    assert ranked.queries.tolist() == [1, 0]
    assert ranked.boxes.tolist() == [pytest.approx([0, 0, 100, 100]), pytest.approx([80, 30, 120, 70])]
    assert ranked.scores[0] > ranked.scores[1]


def test_ties_are_broken_by_the_box_whatever_the_query_order() -> None:
    left, right = [0.2, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2]
    one = rank_boxes(output_with([0.0, 0.0], [left, right]), [(10, 10)])[0]
    other = rank_boxes(output_with([0.0, 0.0], [right, left]), [(10, 10)])[0]
    assert one.boxes.tolist() == other.boxes.tolist()
    assert one.queries.tolist() == [1, 0] and other.queries.tolist() == [0, 1]


def test_nan_names_its_example() -> None:
    with pytest.raises(InputError, match="example 0"):
        rank_boxes(output_with([float("nan")], [[0.5, 0.5, 0.1, 0.1]]), [(10, 10)])
