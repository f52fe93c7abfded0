"""Rows of a pass that are only read end at the deepest tap, in the same pass as rows that are predicted.

Stage 2 predicts a picture under its caption, and reads it under others as well. In one pass what these rows have in
common is computed once (`shared_rows`), and every call works on more rows at once. Where nothing can be shared two
passes are no dearer and hold less at once, so they stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dpt_t2i.backbones.types import Tap


def behind_taps(unet: Any, taps: Sequence[Tap]) -> tuple[str, ...]:
    """Paths of the modules of a U-Net that run behind the deepest of `taps`, as far as whole rows can be dropped there.

    None where there is nothing behind it, or where another part of its block still joins what went before it.
    """
    blocks = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    blocks += ["mid_block"] if getattr(unet, "mid_block", None) is not None else []
    blocks += [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    block_of = {tap.module: _block_of(tap.module, blocks) for tap in taps}
    if not taps or None in block_of.values():
        return ()
    deepest = max(block_of.values(), key=lambda block: blocks.index(str(block)))
    later = blocks[blocks.index(str(deepest)) + 1 :]
    # Within its block the tap may be followed by the sampler alone, which takes nothing but the map.
    sampler = [f"{deepest}.upsamplers.0"] if _sampler_alone_follows(unet, str(deepest), taps) else []
    return (*sampler, *later) if later else ()


@contextmanager
def first_rows(denoiser: nn.Module, paths: Sequence[str], rows: int, first: int) -> Iterator[None]:
    """Within, the modules at `paths` see the `first` of the `rows` rows of a pass."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:first] if value.ndim and len(value) == rows else value
        return tuple(cut(one) for one in value) if isinstance(value, tuple) else value

    def before(_module: nn.Module, inputs: Any, named: Any) -> Any:
        return cut(inputs), {name: cut(value) for name, value in named.items()}

    handles = [denoiser.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _block_of(module: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if f"{module}.".startswith(f"{block}.")), None)


def _sampler_alone_follows(unet: nn.Module, block: str, taps: Sequence[Tap]) -> bool:
    """Is a tap the last attention of an up block, and none behind it, so that its sampler alone follows?"""
    if not block.startswith("up_blocks"):
        return False
    inner: Any = unet.get_submodule(block)
    last = len(getattr(inner, "attentions", None) or ()) - 1
    behind = any(tap.module == block or f"{tap.module}.".startswith(f"{block}.upsamplers.") for tap in taps)
    sampled = getattr(inner, "upsamplers", None) is not None and not behind
    return sampled and any(tap.module == f"{block}.attentions.{last}" for tap in taps)
