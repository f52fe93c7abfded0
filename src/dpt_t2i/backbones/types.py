"""What crosses the door between a T2I model and everything that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

GUIDANCE = "guidance"  # key of `TextStates.extras`


@dataclass(frozen=True)
class Tap:
    """One place of the denoiser whose output map is read: declared data, never a constant elsewhere."""

    name: str  # `up1`, or the dotted path itself for an inner block
    module: str  # dotted path inside the denoiser, e.g. `up_blocks.1`
    channels: int  # C of the map
    stride: int  # latent pixels per feature pixel (16x16 latents, stride 4 -> 4x4 map)
    # A block returns the image stream, or a tuple with it; as a map [B, C, h, w] or as tokens [B, h * w, C] by rows.
    select: Literal["tensor", "first", "second"] = "tensor"


@dataclass(frozen=True)
class PipelineCall:
    """Where a family's diffusers pipeline speaks to its denoiser in other words than the backbone does."""

    timestep_scale: float = 1.0  # the denoiser's `timestep` argument times this is the backbone's timestep
    unpack: Callable[[Tensor, int, int], Tensor] | None = None  # the pipeline's latents, h, w -> [B, C, h, w]
    pack: Callable[[Tensor], Tensor] | None = None  # and back; None for both where the pipeline's are that already


@dataclass(frozen=True)
class TextStates:
    """A batch of encoded texts, as the denoiser wants them."""

    tokens: Tensor  # [B, L, D] token states: the denoiser's `encoder_hidden_states`
    pooled: Tensor  # [B, P] pooled vector p(y) that `match_score` compares with
    mask: Tensor  # [B, L] bool, True on real tokens (BOS and EOS included), False on padding
    # Further denoiser inputs, each [B, ...]. `guidance` [B] means that the denoiser takes the guidance scale as an
    # input (or needs none): such a family has no unconditional branch.
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, index: Tensor) -> TextStates:
        """Rows `index` [N] (long) of the batch, repeats allowed: how deduplicated texts are spread out again."""
        return replace(
            self,
            tokens=self.tokens[index],
            pooled=self.pooled[index],
            mask=self.mask[index],
            extras={key: value[index] for key, value in self.extras.items()},
        )

    def alike(self, first: Tensor, second: Tensor) -> Tensor:
        """Of rows `first` and `second` [N] (long) whether each two are one text to the encoders, [N] bool: two that
        differ behind the token limit, or in capitals alone."""
        same = torch.ones_like(first, dtype=torch.bool)
        for states in (self.tokens, self.pooled):  # rounding of half a precision, in another batch, makes no other text
            difference = (states[first] - states[second]).float().abs().flatten(1).amax(1)
            same &= difference <= 1e-3 * states[first].float().abs().flatten(1).amax(1)
        return same

    def to(self, device: torch.device) -> TextStates:
        """The same on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            pooled=self.pooled.to(device),
            mask=self.mask.to(device),
            extras={key: value.to(device) for key, value in self.extras.items()},
        )

    @staticmethod
    def cat(parts: list[TextStates]) -> TextStates:
        """Stack batches along B; all parts must have the same L."""
        first = parts[0]
        return TextStates(
            tokens=torch.cat([p.tokens for p in parts]),
            pooled=torch.cat([p.pooled for p in parts]),
            mask=torch.cat([p.mask for p in parts]),
            extras={key: torch.cat([p.extras[key] for p in parts]) for key in first.extras},
        )


@dataclass(frozen=True)
class Features:
    """Maps read at one or several taps in one pass of the denoiser."""

    maps: Mapping[str, Tensor]  # tap name -> [B, C, h, w], float, in the order in which they were asked for
    timesteps: Tensor  # [B] the denoiser's timesteps: 0..999 for DDPM-style models, floats 0..1000 for flow matching

    def __len__(self) -> int:
        return self.timesteps.shape[0]


def one_each(timesteps: Tensor | float, like: Tensor) -> Tensor:
    """`[B]` timesteps of the rows of `like` `[B, ...]`, on its device; one number may stand for all."""
    return torch.as_tensor(timesteps, device=like.device).expand(len(like))
