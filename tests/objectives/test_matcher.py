"""Hungarian matching on cases that can be solved by hand."""

import pytest
import torch

from dpt_t2i.objectives.matcher import match_queries, pairwise_cost
from dpt_t2i.objectives.types import GroundingTargets

LEFT, RIGHT, MIDDLE = [0.2, 0.5, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]


def targets_of(*examples: list[list[float]], token: int = 0, classes: int = 3) -> GroundingTargets:
    rows = [torch.zeros(len(boxes), classes) for boxes in examples]
    for row in rows:
        row[:, token] = 1.0
    return GroundingTargets(tuple(torch.tensor(boxes).reshape(-1, 4) for boxes in examples), tuple(rows))


def test_cost_of_one_pair() -> None:
    """Uniform over 3 classes: class -1/3. L1 0.6. Boxes 0.04 each in a hull of 0.8 x 0.2: GIoU -(0.16-0.08)/0.16."""
    cost = pairwise_cost(torch.zeros(1, 1, 3), torch.tensor([[LEFT]]), targets_of([RIGHT]), torch.tensor([0]))
    assert cost.item() == pytest.approx(-1 / 3 + 5 * 0.6 - 2 * -0.5)


def test_the_assignment_is_globally_best_not_greedy() -> None:
    """Both boxes are nearest to query 0; the total is least if the nearer box yields it."""
    predicted = torch.tensor([[[0.4, 0.5, 0.2, 0.2], [0.3, 0.5, 0.2, 0.2], [0.9, 0.1, 0.1, 0.1]]])
    near, far = [0.38, 0.5, 0.2, 0.2], [0.45, 0.5, 0.2, 0.2]
    matching = match_queries(torch.zeros(1, 3, 3), predicted, targets_of([near, far]))
    assert matching.queries.tolist() == [0, 1]
    assert matching.targets.tolist() == [1, 0]


def test_the_class_decides_between_equal_boxes() -> None:
    logits = torch.zeros(1, 3, 3)
    logits[0, 2, 0] = 4.0
    matching = match_queries(logits, torch.tensor([[LEFT, LEFT, LEFT]]), targets_of([LEFT]))
    assert matching.queries.tolist() == [2]


def test_batched_equals_one_by_one() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, boxes = torch.randn(4, 6, 3, generator=generator), torch.rand(4, 6, 4, generator=generator)
    wanted = [torch.rand(n, 4, generator=generator).tolist() for n in (2, 0, 1, 3)]
    together = match_queries(logits, boxes, targets_of(*wanted))
    offset = 0
    for example, one in enumerate(wanted):
        alone = match_queries(logits[example][None], boxes[example][None], targets_of(one))
        mine = together.examples == example
        assert together.queries[mine].tolist() == alone.queries.tolist()
        assert (together.targets[mine] - offset).tolist() == alone.targets.tolist()
        offset += len(one)


def test_no_box_anywhere_gives_no_pair() -> None:
    matching = match_queries(torch.zeros(2, 3, 3), torch.rand(2, 3, 4), targets_of([], []))
    assert matching.examples.numel() == matching.queries.numel() == matching.targets.numel() == 0


def test_more_boxes_than_queries_match_the_cheapest() -> None:
    matching = match_queries(torch.zeros(1, 1, 3), torch.tensor([[MIDDLE]]), targets_of([LEFT, MIDDLE, RIGHT]))
    assert matching.targets.tolist() == [1]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_box_is_matched_so_that_the_loss_tells(broken: float) -> None:
    boxes = torch.tensor([[LEFT, RIGHT]])  # the first would be right for free
    boxes[0, 1, 0] = broken
    assert match_queries(torch.zeros(1, 2, 3), boxes, targets_of([LEFT])).queries.tolist() == [1]
