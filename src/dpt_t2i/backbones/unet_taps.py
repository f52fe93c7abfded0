"""The taps of a U-Net, computed from its own config: any number of levels, any widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpt_t2i.backbones.types import Tap

# Entries of the U-Net's config that decide whether a LoRA or an adapter fits.
ARCHITECTURE_KEYS = (
    "in_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "transformer_layers_per_block",
    "cross_attention_dim",
    "use_linear_projection",
)


def unet_taps(config: Mapping[str, Any]) -> dict[str, Tap]:
    """`bottom0..`, `mid`, `up0..` of a diffusers `UNet2DConditionModel`, in the order of its forward pass.

    The feature of a block is its output hidden state: a down block's after its downsampler (the last has none), an up
    block's after its upsampler (the last has none). Names as in the released code; the paper reads `up1`.
    """
    widths: Sequence[int] = config["block_out_channels"]
    last = len(widths) - 1
    taps = [
        Tap(f"bottom{i}", f"down_blocks.{i}", width, 2 ** min(i + 1, last), "first") for i, width in enumerate(widths)
    ]
    if config.get("mid_block_type") is not None:
        taps.append(Tap("mid", "mid_block", widths[-1], 2**last))
    taps += [Tap(f"up{i}", f"up_blocks.{i}", widths[last - i], 2 ** max(last - i - 1, 0)) for i in range(len(widths))]
    return {tap.name: tap for tap in taps}
