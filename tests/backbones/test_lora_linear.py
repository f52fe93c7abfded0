"""A trained LoRA as one function: PEFT's numbers, and PEFT's own way wherever there is more than one plain LoRA."""

from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from dpt_t2i.backbones.lora_linear import OneFunctionLinear, _LoraLinear, as_one_function
from tests.backbones.test_lora import adapted_modules, trained


class Layer(nn.Module):
    def __init__(self, kind: type[nn.Linear] = nn.Linear, dtype=torch.float64) -> None:
        super().__init__()
        self.to_q = kind(5, 3, dtype=dtype)


def adapted(ours: bool, dtype=torch.float64, names=("one",), **named) -> nn.Module:
    """A linear layer with a LoRA of rank 2 and scale 3/2 by PEFT's class or ours; the same values each time."""
    torch.manual_seed(0)
    layer = Layer(dtype=dtype)
    for name in names:
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False, **named)
        if ours:
            as_one_function(config, layer)
        inject_adapter_in_model(config, layer, name)
    layer.to_q.base_layer.requires_grad_(False)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=parameter.dtype)
    assert type(layer.to_q) is (OneFunctionLinear if ours else PeftLinear)
    return layer.to_q


def inputs(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 4, 5, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def in_one(layer: nn.Module, x: torch.Tensor) -> bool:
    """Did the layer's forward take the one function?"""
    with patch.object(_LoraLinear, "apply", wraps=_LoraLinear.apply) as calls:
        layer(x)
    return calls.call_count == 1


@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 5), (1, 2, 2, 5)])
def test_result_is_the_formula_of_the_paper(shape):
    layer, x = adapted(ours=True).double(), torch.randn(shape, dtype=torch.float64)
    weight = layer.base_layer.weight + 1.5 * layer.lora_B["one"].weight @ layer.lora_A["one"].weight
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base_layer.bias)
    assert in_one(layer, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("asked", [True, False], ids=["of the input too", "of the LoRA alone"])
def test_gradients_are_pefts(bias, asked):
    found = []
    for ours in (True, False):
        layer, x = adapted(ours).double(), inputs().requires_grad_(asked)
        layer.base_layer.bias = layer.base_layer.bias if bias else None
        layer(x).pow(2).sum().backward()
        found.append([x.grad, layer.lora_A["one"].weight.grad, layer.lora_B["one"].weight.grad])
    for own, theirs in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs)
    assert (found[0][0] is not None) == asked


def test_gradients_are_those_of_finite_differences():
    layer, x = adapted(ours=True).double(), inputs()
    scale, weights = 1.5, (layer.lora_A["one"].weight, layer.lora_B["one"].weight)
    base = layer.base_layer
    assert torch.autograd.gradcheck(
        lambda x, down, up: _LoraLinear.apply(x, base.weight, base.bias, down, up, scale), (x.flatten(0, 1), *weights)
    )


def test_backward_inside_autocast_keeps_the_dtypes_of_forward():
    layer, x = adapted(ours=True, dtype=torch.float32), inputs(torch.float32)
    result = layer(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        result.backward()
    expected = layer.base_layer.weight + 1.5 * layer.lora_B["one"].weight @ layer.lora_A["one"].weight
    torch.testing.assert_close(x.grad, expected.sum(0).expand(2, 4, 5).detach())


def test_gradients_of_a_gradient_are_refused():
    layer, x = adapted(ours=True).double(), inputs()
    (gradient,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_results_and_gradients_are_pefts_but_for_half_precision(dtype):
    found = []
    for ours in (True, False):
        layer, x = adapted(ours, torch.float32), inputs(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            result = layer(x)
            assert in_one(layer, x) == ours
        result.float().sum().backward()
        found.append([result, x.grad, layer.lora_A["one"].weight.grad, layer.lora_B["one"].weight.grad])
    for own, theirs in zip(*found, strict=True):
        assert own.dtype == theirs.dtype
        torch.testing.assert_close(own, theirs, rtol=0.05, atol=0.1)
    assert found[0][0].dtype == torch.bfloat16
    assert found[0][2].dtype == torch.float32


def test_half_precision_base_with_a_float32_lora_goes_pefts_way():
    found = []
    for ours in (True, False):
        layer = adapted(ours, torch.bfloat16)
        for part in (layer.lora_A, layer.lora_B):
            part.float()
        found.append(layer(inputs(torch.bfloat16)))
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(*found)
    assert not in_one(layer, inputs(torch.bfloat16))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.merge(),
        lambda layer: layer.set_adapter(["one", "two"]),
        lambda layer: layer.set_adapter([]),
        lambda layer: layer.base_layer.requires_grad_(),
    ],
    ids=["disabled", "merged", "two adapters", "none active", "base learns"],
)
def test_anything_but_one_plain_adapter_goes_pefts_way(change):
    own, theirs = (adapted(ours, names=("one", "two")).double() for ours in (True, False))
    for layer in (own, theirs):
        change(layer)
    assert torch.equal(own(inputs()), theirs(inputs()))
    assert not in_one(own, inputs())


@pytest.mark.parametrize("named", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_is_more_than_a_lora_goes_pefts_way(named):
    own, theirs = (adapted(ours, **named).double().eval() for ours in (True, False))
    torch.testing.assert_close(own(inputs()), theirs(inputs()))
    assert not in_one(own, inputs())


def test_a_pass_that_teaches_nothing_is_pefts_bit_for_bit():
    own, theirs = (adapted(ours).double() for ours in (True, False))
    with torch.no_grad():
        assert torch.equal(own(inputs()), theirs(inputs()))
        assert not in_one(own, inputs())
    own.requires_grad_(False)  # self-correction asks for the latents' gradient of a LoRA that is not trained
    assert torch.equal(own(inputs()), theirs(inputs()))
    assert not in_one(own, inputs())


def test_a_second_adapter_that_is_not_active_changes_nothing():
    layer = adapted(ours=True, names=("one", "two")).double()
    layer.set_adapter("two")
    weight = layer.base_layer.weight + 1.5 * layer.lora_B["two"].weight @ layer.lora_A["two"].weight
    torch.testing.assert_close(layer(inputs()), inputs() @ weight.T + layer.base_layer.bias)
    assert in_one(layer, inputs())


def test_layers_of_another_kind_are_left_to_peft():
    class Quantised(nn.Linear):
        pass

    layer = Layer(Quantised)
    config = LoraConfig(r=2, target_modules=["to_q"])
    as_one_function(config, layer)
    inject_adapter_in_model(config, layer, "one")
    assert type(layer.to_q) is PeftLinear


def test_weights_of_another_kind_are_left_to_peft():
    class Packed(torch.Tensor):
        pass

    layer = Layer()
    layer.to_q.weight = nn.Parameter(torch.randn(3, 5).as_subclass(Packed), requires_grad=False)
    config = LoraConfig(r=2, target_modules=["to_q"])
    as_one_function(config, layer)
    assert not config._custom_modules


def test_every_adapted_projection_of_a_denoiser_is_one():
    backbone = trained()
    kinds = {type(backbone.denoiser.get_submodule(name)) for name in adapted_modules(backbone)}
    assert kinds == {OneFunctionLinear}
