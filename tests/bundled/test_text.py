"""The terms that the encoders' training adds to CLIP's loss."""

import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def text(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools/bundled")  # its scripts import each other by name
    return importlib.import_module("text")


def test_only_near_pairs_are_crowded(text):
    own = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    near = torch.tensor([[3.0, 0.0], [1.0, 3**0.5], [-1.0, 0.0]])  # cosines 1, 0.5, -1
    assert text.crowded(torch.cat([own, near])).item() == pytest.approx((1 - text.APART) ** 2 / 3)


def test_what_moved_is_told_against_the_spread_of_before_without_the_pooled_state(text):
    before = torch.tensor([[[0.0], [2.0], [1.0]], [[2.0], [0.0], [1.0]]])  # variance 1, of the last state 0
    after = before + torch.tensor([[[0.5], [0.0], [9.0]], [[0.0], [0.0], [9.0]]])
    assert text.moved(after, before, torch.tensor([2, 2])).item() == pytest.approx(0.25 / 4)
    assert text.moved(after, before, torch.tensor([0, 2])).item() > 10
