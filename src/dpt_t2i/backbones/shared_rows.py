"""Rows of a pass that show the same noised picture are computed once, up to where the denoiser first reads the text.

Training asks of one picture, under one noise, whether it fits several captions. Until its first cross-attention a U-Net
cannot tell these rows apart, and that far lie its largest maps. What is shared is exact: the same modules see the same
rows, each once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpt_t2i.backbones.reader import is_compiled

# Where the text, or what goes with it, is part of the time embedding, which every block sees.
_IN_EMBEDDING = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")


def before_text(unet: Any) -> tuple[str, ...]:
    """Paths of the modules of a `UNet2DConditionModel` that run before it reads the text, in that order.

    None where the text reaches the time embedding (SDXL).
    """
    config = unet.config
    if any(config.get(key) is not None for key in _IN_EMBEDDING):
        return ()
    paths = ["conv_in"]
    for number, (kind, block) in enumerate(zip(config["down_block_types"], unet.down_blocks, strict=True)):
        path = f"down_blocks.{number}"
        if kind == "DownBlock2D":
            paths += [f"{path}.resnets.{i}" for i in range(len(block.resnets))]
            paths += [f"{path}.downsamplers.{i}" for i in range(len(block.downsamplers or ()))]
            continue
        if kind == "CrossAttnDownBlock2D":
            paths.append(f"{path}.resnets.0")
            layers = getattr(block.attentions[0], "transformer_blocks", None)  # None: a dual transformer
            if layers is not None and not layers[0].only_cross_attention:
                paths.append(f"{path}.attentions.0.transformer_blocks.0.attn1")
        break
    return tuple(paths)


@contextmanager
def shared_rows(
    denoiser: nn.Module, paths: Sequence[str], pictures: Tensor | None, apart: Sequence[str] = ()
) -> Iterator[None]:
    """Within, the modules at `paths` see one row of each picture, and hand its answer to all rows that show it.

    Does nothing where a pass may run once more with these hooks gone (gradient checkpointing) or does not notice them
    (compiled).

    Args:
        paths: of `before_text`.
        pictures: `[N]` for N rows of the pass: those with the same number hold the same z_t and t. None = not known.
        apart: modules whose own answer is read; what holds one of them is left as it is.
    """
    paths = [path for path in paths if not any(f"{one}.".startswith(f"{path}.") for one in apart)]
    rerun = torch.is_grad_enabled() and getattr(denoiser, "is_gradient_checkpointing", False)
    if pictures is None or not paths or rerun or is_compiled(denoiser):
        yield
        return
    found, index = torch.unique(pictures, return_inverse=True)
    if len(found) == len(pictures):
        yield
        return
    rows = torch.arange(len(index), device=index.device)
    first = torch.zeros_like(found, dtype=rows.dtype).scatter_reduce(0, index, rows, "amin", include_self=False)

    def once(value: Any) -> Any:
        return (
            value.index_select(0, first)
            if isinstance(value, Tensor) and value.ndim and len(value) == len(rows)
            else value
        )

    def before(_module: nn.Module, inputs: Any, named: Any) -> Any:
        return tuple(once(value) for value in inputs), {name: once(value) for name, value in named.items()}

    def behind(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.index_select(0, index)  # on a CPU its gradient is summed in one order; that of `[index]` is not

    modules = [denoiser.get_submodule(path) for path in paths]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(behind) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
