"""The running average of a LoRA: its numbers, its place on the model, its file."""

import pytest
import torch

from dpt_t2i.backbones.lora import add_lora, load_lora, lora_parameters, save_lora
from dpt_t2i.errors import InputError
from dpt_t2i.training.ema import FOLDER, LoraAverage
from tests.tiny import tiny_backbone


def filled(value: float):
    backbone = tiny_backbone()
    add_lora(backbone, 2)
    fill(backbone, value)
    return backbone


def fill(backbone, value: float) -> None:
    with torch.no_grad():
        for parameter in lora_parameters(backbone):
            parameter.fill_(value)


def test_it_follows_slowly():
    backbone = filled(1.0)
    average = LoraAverage(backbone, decay=0.75)
    for value in (2.0, 4.0):
        fill(backbone, value)
        average.update()
    # 0.75 x 1 + 0.25 x 2 = 1.25, then 0.75 x 1.25 + 0.25 x 4
    assert all(torch.allclose(value, torch.tensor(1.9375)) for value in average.values)
    assert all((parameter == 4.0).all() for parameter in lora_parameters(backbone)), "training goes on with its own"


def test_it_is_saved_as_a_lora_and_taken_up_again(tmp_path):
    backbone = filled(1.0)
    average = LoraAverage(backbone, decay=0.5)
    fill(backbone, 3.0)
    average.update()
    save_lora(backbone, tmp_path, {})
    with average.in_place():
        save_lora(backbone, tmp_path / FOLDER, {})
    assert all((parameter == 3.0).all() for parameter in lora_parameters(backbone))
    other = filled(9.0)
    again = LoraAverage(other, decay=0.5)
    again.load(tmp_path)
    load_lora(other, tmp_path, trainable=True)
    assert all((value == 2.0).all() for value in again.values)
    assert all((parameter == 3.0).all() and parameter.requires_grad for parameter in lora_parameters(other))
    again.update()
    assert all((value == 2.5).all() for value in again.values)


def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    backbone = filled(1.0)
    save_lora(backbone, tmp_path, {})
    with pytest.raises(
        InputError, match="holds no running average: it was written without ema_decay; leave ema_decay out"
    ):
        LoraAverage(backbone, decay=0.5).load(tmp_path)
