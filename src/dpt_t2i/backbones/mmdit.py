"""What the multimodal transformers (SD 3, FLUX) share: blocks that return (text tokens, image tokens), and patches."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dpt_t2i.backbones.parts import PipelineParts
from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError


class JointParts(PipelineParts):
    """Parts of a pipeline whose `transformer` takes token states and a pooled vector, with widths by these names."""

    denoiser_key = "transformer"

    @property
    def pooled_dim(self) -> int:
        return int(self.config["pooled_projection_dim"])

    @property
    def text_dim(self) -> int:
        return int(self.config["joint_attention_dim"])


def joint_block_taps(stages: Mapping[str, tuple[str, int]], channels: int, stride: int) -> dict[str, Tap]:
    """The image stream after each block, in the order of the forward pass.

    Args:
        stages: prefix of the taps' names -> (dotted path of the list of blocks, its length).
        channels: width of the image stream, the same in all blocks.
        stride: latent pixels per side of a token.
    """
    taps = [
        Tap(f"{prefix}{index}", f"{path}.{index}", channels, stride, "second")
        for prefix, (path, count) in stages.items()
        for index in range(count)
    ]
    return {tap.name: tap for tap in taps}


def check_patches(noisy: Tensor, patch: int, vae_scale: int) -> None:
    """Raises `InputError` where a side of z_t `[B, C, h, w]` is no multiple of the patch."""
    height, width = noisy.shape[-2:]
    if height % patch or width % patch:
        raise InputError(
            f"image of {width * vae_scale} x {height * vae_scale} pixels: both sides must be multiples of "
            f"{patch * vae_scale}, as the denoiser reads latents in patches of {patch} x {patch}"
        )
