"""`--gpuid 0` as in the release: that GPU, or what there is; and where an offloaded model runs."""

import pytest
import torch
from accelerate import cpu_offload_with_hook

from dpt_t2i.backbones.loading import backbone_of, load_backbone, resolve_device
from dpt_t2i.errors import InputError
from tests.families import FAMILIES


def test_a_number_without_cuda_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("0") == resolve_device("auto")


def test_a_number_with_cuda_is_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="`cuda:2` is not here: 2 CUDA devices found"):
        resolve_device("2")


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"pixart_sigma"}))  # its T5 looks at the mask's values
def test_texts_of_an_offloaded_model_lie_where_it_runs(family, tmp_path):
    """Offloaded models lie on the CPU and run elsewhere; the meta device stands for a GPU."""
    pipeline = load_backbone(FAMILIES[family](tmp_path / family), device="cpu").pipeline
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload_with_hook(part, execution_device="meta")
    backbone = backbone_of(pipeline)
    assert backbone.device.type == "meta"
    states = backbone.encode_text(["a red circle", "a star"])
    found = {value.device.type for value in (states.tokens, states.pooled, states.mask, *states.extras.values())}
    assert found == {"meta"}
    assert states.select(torch.zeros(3, dtype=torch.long, device="meta")).tokens.shape[0] == 3
