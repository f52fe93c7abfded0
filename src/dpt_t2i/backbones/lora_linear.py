"""PEFT's LoRA round a linear layer; while it is trained, `x W^T + s x A^T B^T` and its gradient as one function.

PEFT computes `base(x) + B(A(x)) * s` by three operators: each writes an output that is as large as the projection's
own, and autograd goes back through each. On small models these passes over memory cost as much as the products. Here
each product adds itself to what is there. A LoRA that is not trained is computed by PEFT, so that images are those of
stock diffusers bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class OneFunctionLinear(PeftLinear):
    """As `peft.tuners.lora.Linear`: the same parameters, names and results, but for rounding in a training step.

    What is more than one plain LoRA on a frozen layer (dropout, DoRA, several adapters, a bias of B, another dtype than
    the layer's) goes PEFT's own way there too.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs or x.dim() < 2 else self._learning_adapter()
        if name is None:
            return self._by_peft(x, *args, **kwargs)
        base, down, up = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        tensors: tuple[Tensor | None, ...] = (x.flatten(0, -2), base.weight, base.bias, down, up)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)
        elif not x.dtype == base.weight.dtype == down.dtype:
            return self._by_peft(x)
        rows: Tensor = _LoraLinear.apply(*tensors, self.scaling[name])
        return rows.unflatten(0, x.shape[:-1])

    def _by_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(x, *args, **kwargs)
        return result

    def _learning_adapter(self) -> str | None:
        """The one active adapter, where it is a plain one that learns from this pass, on a layer that does not."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or not torch.is_grad_enabled():
            return None
        (name,), up = names, self.lora_B[names[0]]
        plain = isinstance(self.lora_dropout[name], nn.Identity) and up.bias is None and name not in self.lora_variant
        frozen = not any(parameter.requires_grad for parameter in self.base_layer.parameters())
        return name if plain and frozen and up.weight.requires_grad else None


class _LoraLinear(torch.autograd.Function):
    """`x [N, in], W [out, in], b [out] | None, A [r, in], B [out, r], s -> [N, out]`; gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        inner = x @ down.t()
        ctx.save_for_backward(x, inner, weight if ctx.needs_input_grad[0] else None, down, up)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(inner, up.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):  # whoever calls backward inside: dtypes are settled
            of_inner = (gradient @ up).mul_(ctx.scale)
            of_x = None if weight is None else (gradient @ weight).addmm_(of_inner, down)
            return of_x, None, None, of_inner.t() @ x, (gradient.t() @ inner).mul_(ctx.scale), None


def as_one_function(config: LoraConfig, denoiser: nn.Module) -> None:
    """Let PEFT put `OneFunctionLinear` round the linear layers of a denoiser. One with other kinds of layers or weights
    (quantised ones) is left to PEFT, which has a class for each."""
    linear = [module for module in denoiser.modules() if isinstance(module, nn.Linear)]
    if all(type(module) is nn.Linear and type(module.weight.data) is Tensor for module in linear):
        config._register_custom_module({nn.Linear: OneFunctionLinear})  # PEFT's way, which it calls experimental
