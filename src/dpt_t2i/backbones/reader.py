"""Reading maps out of a denoiser with forward hooks, and leaving it early.

Hooks are public PyTorch, sit outside gradient checkpointing, and change no number: the features equal those of a
full pass bit for bit, and gradients reach the latents and the LoRA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpt_t2i.backbones.taps import detach_map, pick_map
from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError

T = TypeVar("T")


class _EverythingRead(Exception):
    """Raised inside the hook of the last wanted tap; never leaves this file."""


def read_maps(
    module: nn.Module,
    taps: Sequence[Tap],
    run: Callable[[], T],
    early_exit: bool,
    sides: tuple[int, int] | None = None,
) -> tuple[dict[str, Tensor], T | None]:
    """Call `run` (one pass of `module`) and keep the map at each of `taps`.

    Args:
        sides: (height, width) of the latents, by which tokens are laid out; needed for transformers only.

    Returns:
        tap name -> `[B, C, h, w]` in the order of `taps`, and what `run` returned (None after an early exit, which
        skips everything behind the deepest tap).

    Raises:
        InputError: a tap's module was never reached.
    """
    if early_exit and not taps:
        raise ValueError("an early exit needs at least one tap")
    outputs, result = _run_with_hooks(module, [tap.module for tap in taps], run, early_exit)
    for tap in taps:
        if tap.module not in outputs:
            raise InputError(f"tap `{tap.name}`: module {tap.module} takes no part in the denoiser's forward pass")
    return {tap.name: pick_map(outputs[tap.module], tap, sides) for tap in taps}, result


def read_output(module: nn.Module, path: str, run: Callable[[], Any]) -> Any:
    """Whatever the inner module `path` returned in `run`, or None where it took no part; leaves early."""
    return _run_with_hooks(module, [path], run, early_exit=True)[0].get(path)


@contextlib.contextmanager
def gradient_cut(module: nn.Module, tap: Tap) -> Iterator[None]:
    """Within, the blocks behind `tap` send no gradient into its map; the map that is read there still carries one."""

    def cut(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return detach_map(output, tap)

    handle = module.get_submodule(tap.module).register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def _run_with_hooks(
    module: nn.Module, paths: Sequence[str], run: Callable[[], T], early_exit: bool
) -> tuple[dict[str, Any], T | None]:
    outputs: dict[str, Any] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.setdefault(path, output)  # of a module that runs several times the first, as an early exit does
            if early_exit and len(outputs) == len(set(paths)):
                raise _EverythingRead

        return hook

    # In a whole pass before other hooks, which may hand on another answer than is read (`gradient_cut`); where the pass
    # ends here after them, so that they run.
    handles = [module.get_submodule(path).register_forward_hook(keep(path), prepend=not early_exit) for path in paths]
    try:
        with _hooks_heard(module) if paths else contextlib.nullcontext():
            return outputs, run()
    except _EverythingRead:
        return outputs, None
    finally:
        for handle in handles:
            handle.remove()


def _hooks_heard(module: nn.Module) -> AbstractContextManager[Any]:
    """A compiled graph does not notice hooks that were put up after it was traced: reading runs the plain code.

    A pass that reads nothing, such as the guided prediction, stays compiled.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled(module) else contextlib.nullcontext()


def is_compiled(module: nn.Module) -> bool:
    """Does any part of it run as a compiled graph?"""
    return hasattr(module, "_orig_mod") or any(
        getattr(inner, "_compiled_call_impl", None) is not None for inner in module.modules()
    )
