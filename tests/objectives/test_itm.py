"""Image-text matching: hand-worked cross entropies."""

import math

import pytest
import torch

from dpt_t2i.objectives.itm import itm_loss

LOOSE = torch.tensor(1.0)


def test_equal_scores_cost_log_three_each_way() -> None:
    losses = itm_loss(torch.zeros(2, 3), torch.full((2, 3), 0.7), torch.tensor(14.0))
    assert losses["loss_i2t"].item() == pytest.approx(math.log(3))
    assert losses["loss_t2i"].item() == pytest.approx(math.log(3))


def test_column_zero_is_the_positive_and_directions_are_kept_apart() -> None:
    right, wrong = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    losses = itm_loss(right, wrong, torch.tensor(10.0))
    assert losses["loss_i2t"].item() == pytest.approx(math.log(1 + 2 * math.exp(-10)), abs=1e-6)
    assert losses["loss_t2i"].item() == pytest.approx(10.0, abs=1e-3)


def test_missing_candidates_drop_out_even_if_their_score_is_nan() -> None:
    scores = torch.tensor([[0.0, torch.nan, 0.0], [0.3, torch.nan, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, False, False]])
    loss = itm_loss(scores, torch.zeros(2, 3), LOOSE, mask_i2t=mask)["loss_i2t"]
    assert loss.item() == pytest.approx(math.log(2) / 2)  # one pair to tell apart, one example with nothing to tell
    loss.backward()
    assert scores.grad is not None and torch.allclose(scores.grad, torch.tensor([[-0.25, 0, 0.25], [0, 0, 0]]))


def test_half_precision_scores_are_judged_in_float32() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.125]], dtype=torch.bfloat16)
    loss = itm_loss(scores, scores, torch.tensor(100.0, dtype=torch.bfloat16))["loss_i2t"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-25) + math.exp(-37.5)), abs=1e-6)
