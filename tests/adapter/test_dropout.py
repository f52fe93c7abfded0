"""Dropout by cheap masks: how many elements fall, that what is left keeps the mean, and that the seed decides."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpt_t2i.adapter.dropout import Dropout, dropout
from dpt_t2i.adapter.transformer import attend

COUNT = 400_003  # no multiple of 4


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_that_falls_is_p_and_the_others_grow(p):
    torch.manual_seed(0)
    found = dropout(torch.ones(COUNT), p, training=True)
    fell = float((found == 0).double().mean())
    assert abs(fell - p) < 4 * math.sqrt(p * (1 - p) / COUNT), "four standard deviations"
    torch.testing.assert_close(found[found != 0].unique(), torch.tensor([1 / (1 - p)]), rtol=2e-4, atol=0)
    assert float(found.mean()) == pytest.approx(1, abs=4 * math.sqrt(p / (1 - p) / COUNT))


def test_growth_undoes_exactly_what_falls():
    """0.1 is 6553.6 / 65536: 6554 of 65536 values of a part of the integer fall, and growth is by that."""
    found = dropout(torch.ones(1000, dtype=torch.float64), 0.1, training=True)
    assert found.max().item() == 65536 / (65536 - 6554)


def test_every_part_of_an_integer_falls_alike_and_on_its_own():
    torch.manual_seed(0)
    fell = (dropout(torch.ones(100_000, 4), 0.5, training=True) == 0).double()
    assert (fell.mean(0) - 0.5).abs().max() < 4 * 0.5 / math.sqrt(100_000)
    correlation = torch.corrcoef(fell.T) - torch.eye(4)
    assert correlation.abs().max() < 4 / math.sqrt(100_000)


def test_gradient_goes_where_the_values_went():
    torch.manual_seed(0)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    found = dropout(x, 0.5, training=True)
    found.sum().backward()
    assert x.grad.unique().tolist() == [0, 2]
    torch.testing.assert_close(found, x * x.grad)


def test_the_seed_decides_the_mask():
    x, masks = torch.ones(1000), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(dropout(x, 0.5, training=True))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("p", "training", "expected"), [(0.5, False, 1.0), (0.0, True, 1.0), (1.0, True, 0.0)], ids=str
)
def test_all_or_nothing(p, training, expected):
    assert dropout(torch.ones(5), p, training).tolist() == [expected] * 5
    assert Dropout(p).train(training)(torch.ones(5)).tolist() == [expected] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype):
    found = dropout(torch.ones(100, dtype=dtype), 0.5, training=True)
    assert found.dtype == dtype
    assert set(found.tolist()) == {0.0, 2.0}


def test_other_devices_have_pytorchs_own(monkeypatch):
    monkeypatch.setattr(F, "dropout", lambda x, p, training: (x.device.type, p, training))
    assert dropout(torch.ones(2, device="meta"), 0.1, True) == ("meta", 0.1, True)


def test_attention_drops_shares_of_places():
    """With one key a share is 1: it falls, or is doubled. Without a fall attention is that without dropout."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 1, dropout=0.5, batch_first=True)
    queries, keys = torch.randn(1, 200, 4), torch.randn(1, 1, 4)
    plain = attend(attention.eval(), queries, keys, keys) - attention.out_proj.bias
    found = attend(attention.train(), queries, keys, keys) - attention.out_proj.bias
    grown = (found / plain).mean(-1).round(decimals=3)
    assert set(grown.flatten().tolist()) == {0.0, 2.0}


def test_attention_with_dropout_has_the_mean_of_that_without():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True).double()
    queries, keys = torch.randn(1, 3, 8).double(), torch.randn(1, 5, 8).double()
    expected = attend(attention.eval(), queries, keys, keys)
    many = attend(attention.train(), queries.expand(20_000, -1, -1), *[keys.expand(20_000, -1, -1)] * 2)
    error = (many.mean(0) - expected[0]) / (many.std(0) / math.sqrt(20_000))
    assert error.abs().max() < 4.5
