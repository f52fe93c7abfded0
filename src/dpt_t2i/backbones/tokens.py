"""Image tokens of a transformer denoiser as maps, and its blocks as taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError

SELECTS: tuple[Literal["first", "second"], ...] = ("first", "second")


def tokens_to_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """`[B, height * width, C]`, row by row -> `[B, C, height, width]`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def joint_block_taps(stages: Mapping[str, tuple[str, int]], channels: int, stride: int) -> dict[str, Tap]:
    """Taps of blocks that return (text tokens, image tokens), in the order of the forward pass.

    Args:
        stages: prefix of the taps' names -> (dotted path of the module list, its length).
        channels: width of the image stream, the same in all blocks.
        stride: latent pixels per token side.
    """
    taps = [
        Tap(f"{prefix}{index}", f"{path}.{index}", channels, stride, "second")
        for prefix, (path, count) in stages.items()
        for index in range(count)
    ]
    return {tap.name: tap for tap in taps}


def tap_of_tokens(path: str, output: Any, tokens: int, stride: int) -> Tap:
    """The tap of module `path`, whose `output` was seen on an image of `tokens` tokens, another number than the text's.

    Raises:
        InputError: the module gives no image tokens `[B, tokens, C]` of their own.
    """
    if isinstance(output, Tensor) and _is_image(output, tokens):
        return Tap(path, path, output.shape[-1], stride)
    values: Sequence[Any] = output if isinstance(output, tuple) else ()
    for select, value in zip(SELECTS, values, strict=False):
        if _is_image(value, tokens):
            return Tap(path, path, value.shape[-1], stride, select)
    raise InputError(f"tap `{path}` gives no image tokens [B, tokens, C]; name a block of the denoiser")


def _is_image(value: Any, tokens: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == tokens
