"""`--gpuid 0` as in the release: that GPU, or what there is."""

import pytest
import torch

from dpt_t2i.backbones.loading import resolve_device
from dpt_t2i.errors import InputError


def test_a_number_without_cuda_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("0") == resolve_device("auto")


def test_a_number_with_cuda_is_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="`cuda:2` is not here: 2 CUDA devices found"):
        resolve_device("2")
