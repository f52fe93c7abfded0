"""AdamW, with its moments in 32 bits or, where bitsandbytes is installed, in 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from dpt_t2i.config import TrainConfig
from dpt_t2i.errors import InputError


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with the learning rate and weight decay of `settings`.

    Raises:
        InputError: `use_8bit_adam` without bitsandbytes.
    """
    kind: Callable[..., torch.optim.Optimizer] = _adamw_8bit() if settings.use_8bit_adam else torch.optim.AdamW
    return kind(list(parameters), lr=settings.learning_rate, weight_decay=settings.adam_weight_decay)


def _adamw_8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(
            "use_8bit_adam needs bitsandbytes: pip install 'dpt-t2i[8bit]', or leave the flag out"
        ) from error
    return AdamW8bit
