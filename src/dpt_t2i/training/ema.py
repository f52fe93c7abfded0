"""A running average of the LoRA: average = decay * average + (1 - decay) * LoRA after every step, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora import load_lora, lora_parameters
from dpt_t2i.errors import InputError

FOLDER = "ema"  # below a run folder or checkpoint: the average as a LoRA file like any other


class LoraAverage:
    """Starts at the LoRA as it is now. With a decay of 0.999 it looks back about 1000 steps."""

    def __init__(self, backbone: Backbone, decay: float) -> None:
        self.backbone, self.decay = backbone, decay
        self.values = [parameter.detach().clone() for parameter in lora_parameters(backbone)]

    @torch.no_grad()
    def update(self) -> None:
        for average, parameter in zip(self.values, lora_parameters(self.backbone), strict=True):
            average.lerp_(parameter, 1.0 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model wears the average."""
        parameters = lora_parameters(self.backbone)
        own = [parameter.data for parameter in parameters]
        for parameter, average in zip(parameters, self.values, strict=True):
            parameter.data = average
        try:
            yield
        finally:
            for parameter, value in zip(parameters, own, strict=True):
                parameter.data = value

    def load(self, checkpoint: Path) -> None:
        """Take up the average of a checkpoint; leaves its LoRA on the model, so the run's own is loaded after it.

        Raises:
            InputError: the checkpoint holds none: it was written without `ema_decay`.
        """
        if not (checkpoint / FOLDER).is_dir():
            raise InputError(
                f"{checkpoint} holds no running average: it was written without ema_decay; leave ema_decay out, or "
                "start a run of its own from this LoRA with --lora"
            )
        load_lora(self.backbone, checkpoint / FOLDER)
        self.values = [parameter.detach().clone() for parameter in lora_parameters(self.backbone)]
