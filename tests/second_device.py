"""A second device made of CPU memory, which refuses what CUDA refuses.

`install()` renames PyTorch's spare backend to `twin`. A tensor there keeps its numbers in a CPU tensor that only
operators of this module reach, so the arithmetic is the CPU's; but a tensor on `twin` and one on the CPU do not mix.
What CUDA lets through passes here too: numbers (tensors without dimensions) from the CPU, indices from the CPU, copies.
So a command that runs with `--device twin` puts every tensor where it says, which is what CUDA asks of it.

A process that has installed the device keeps it: run it in one of its own. The backend is PyTorch's experimental
`torch.utils.backend_registration._setup_privateuseone_for_python_backend`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import Any, NoReturn

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from dpt_t2i.cli import main as command_line

NAME = "twin"

aten = torch.ops.aten
_autocast = torch.library.Library("_", "IMPL")
# Copies from device to device, and indices, which CUDA takes from the CPU.
_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class TwinTensor(torch.Tensor):
    """A tensor on `twin`; `host` are its numbers."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> TwinTensor:
        twin = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        twin.host = host
        return twin

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})

    def tolist(self) -> Any:
        return self.host.tolist()  # PyTorch's own refuses subclasses

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"TwinTensor({self.host!r})"


class _Factories(TorchDispatchMode):
    """Sends to `_run` what makes a tensor on `twin` from none that lies there."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})


class _Backend(_DummyBackendModule):
    """What `torch.twin` answers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> None:
    """Makes `torch.device("twin")` a device of this process, until it ends."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    # An index given as a list becomes a tensor below the reach of modes.
    torch.library.impl("aten::empty_strided", "privateuseone")(_empty_strided)
    torch.library.impl("aten::_copy_from", "privateuseone")(_copy_from)
    # Autocast: what CUDA multiplies in half precision, and nothing else.
    _autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv2d", "scaled_dot_product_attention"):
        operator = getattr(aten, name)
        torch.library.impl(f"aten::{name}", "AutocastPrivateUse1")(functools.partial(_in_half, operator))
    _Factories().__enter__()


def _in_half(operator: Any, *args: Any, **kwargs: Any) -> Any:
    half = torch.get_autocast_dtype(NAME)

    def cast(part: Any) -> Any:
        floating = isinstance(part, torch.Tensor) and part.is_floating_point() and part.device.type == NAME
        return part.to(half) if floating else part

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        args, kwargs = tree_map(cast, (args, kwargs))
        return operator(*args, **kwargs)


def _empty_strided(*args: Any, **kwargs: Any) -> Any:
    return _run(aten.empty_strided.default, args, kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _run(aten.copy_.default, (target, source), {})


def _run(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, TwinTensor)]
    asked = kwargs.get("device")
    target = torch.device(asked).type if asked is not None else (NAME if here else "cpu")
    if not here and target != NAME:
        return operator(*args, **kwargs)
    if here and operator not in _COPIES:
        _refuse_strangers(operator, args, tensors)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if operator is aten._fused_sdp_choice.default:
        return 0  # the arithmetic of plain products, as a device without a fused kernel has
    hosts = tree_map(lambda part: part.host if isinstance(part, TwinTensor) else part, (args, kwargs))
    made = operator(*hosts[0], **hosts[1])
    if operator is aten.copy_.default and not isinstance(args[0], TwinTensor):
        return args[0]  # copied to the CPU, in place
    if target != NAME:
        return made
    parts, shape = tree_flatten(made)
    out = tree_unflatten([TwinTensor(part) if isinstance(part, torch.Tensor) else part for part in parts], shape)
    return return_and_correct_aliasing(operator, args, kwargs, out)


def _refuse_strangers(operator: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    if operator in _INDEXING:
        tensors = [args[0], *(part for part in args[2:3] if isinstance(part, torch.Tensor))]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, TwinTensor) and tensor.dim() > 0]
    if strangers:
        places = ", ".join(f"{tensor.device}{list(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{operator}: expected all tensors on the same device, got {places}")


def main() -> None:
    """`python -m tests.second_device`: runs on the device the commands of `dpt` on stdin, in JSON."""
    install()
    # accelerate knows the spare backend by none of its names, so it is told.
    PartialState.default_device = property(lambda self: torch.device(NAME, 0))
    status = 0
    for words in json.load(sys.stdin):
        AcceleratorState._reset_state(reset_partial_state=True)  # one process, several precisions
        status = status or command_line(words)
    leave(status)


def leave(status: int = 0) -> NoReturn:
    """Ends a process that has the device: its autograd thread knows no orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
