"""AdamW in 32 bits, in 8, and where the latter is not installed."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from dpt_t2i.config import TrainConfig
from dpt_t2i.errors import InputError
from dpt_t2i.training.optimizer import make_optimizer

PARAMETERS = [nn.Parameter(torch.zeros(2))]


def test_rate_and_decay_are_the_configs():
    optimizer = make_optimizer(iter(PARAMETERS), TrainConfig(learning_rate=0.3, adam_weight_decay=0.2))
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.3, 0.2, 1)


def test_8_bits_come_from_bitsandbytes(monkeypatch):
    class Small(torch.optim.AdamW):
        pass

    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit = Small  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    optimizer = make_optimizer(PARAMETERS, TrainConfig(learning_rate=0.3, use_8bit_adam=True))
    assert type(optimizer) is Small and optimizer.param_groups[0]["lr"] == 0.3


def test_without_bitsandbytes_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # import fails
    with pytest.raises(InputError, match=r"use_8bit_adam needs bitsandbytes: pip install 'dpt-t2i\[8bit\]'"):
        make_optimizer(PARAMETERS, TrainConfig(use_8bit_adam=True))
