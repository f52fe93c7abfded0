"""Denoising in a training step: predictions under captions, their errors, and the losses that compare these."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora import lora_disabled
from dpt_t2i.backbones.reader import gradient_cut
from dpt_t2i.backbones.types import Features, Tap
from dpt_t2i.config import DenoiseConfig
from dpt_t2i.objectives.denoise import denoise_dpo_loss, denoise_itm_loss, denoise_loss, prediction_error
from dpt_t2i.training.encode import Encoded

# Blocks of evaluations in a plan, and one that only the full pass knows: the hard image under the hard caption.
OWN, HARD_CAPTION, RANDOM_CAPTION, HARD_IMAGE, RANDOM_IMAGE, EXPRESSION, TWIN = range(7)


@dataclass(frozen=True)
class Draw:
    """The randomness of a micro-batch, the same however the batch is split over processes."""

    noise: Tensor  # [B, C, h, w] shared by all evaluations of an example
    timesteps: Tensor  # [B] likewise
    drop_caption: Tensor  # [B] bool: the denoising term sees the empty text

    def to(self, device: torch.device) -> Draw:
        return Draw(self.noise.to(device), self.timesteps.to(device), self.drop_caption.to(device))


@dataclass(frozen=True)
class Seen:
    """N rows of a full pass."""

    images: Tensor  # [N] rows of the batch's `latents`
    noisy: Tensor  # [N, C, h, w] z_t
    timesteps: Tensor  # [N]
    texts: Tensor  # [N] rows of the batch's `text`
    prediction: Tensor  # [N, C, h, w]
    features: Features  # at the taps


def denoising(
    backbone: Backbone,
    taps: Sequence[Tap],
    batch: Encoded,
    draw: Draw,
    config: DenoiseConfig,
    cut: Tap | None = None,
    more: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Seen]:
    """Denoising loss of the positives, and all that one full pass told of them, then of what `more` adds.

    Args:
        more: rows `[N]` of `latents` that are predicted too, and the rows of `text` that they go under.
    """
    count = len(batch)
    own = torch.arange(count, device=draw.timesteps.device)
    dropped = own[draw.drop_caption]
    again, under = (own[:0], own[:0]) if more is None else more
    images, told = torch.cat([own, again, dropped]), torch.cat([batch.caption, under, batch.null.expand(len(dropped))])
    noisy, timesteps = noised(backbone, batch, draw, images)
    with gradient_cut(backbone.denoiser, cut) if cut else nullcontext():
        prediction, features = backbone.predict(noisy, timesteps, batch.text.select(told), taps, pictures=images)
    kept = slice(0, count + len(again))
    judged = prediction[:count].index_copy(0, dropped, prediction[kept.stop :])
    mse = denoise_loss(
        judged,
        backbone.target(batch.latents[:count], draw.noise, draw.timesteps),
        snr=backbone.snr(draw.timesteps),
        snr_gamma=config.snr_gamma,
        prediction_type=backbone.prediction_type,
    )
    return mse, Seen(images[kept], noisy[kept], timesteps[kept], told[kept], prediction[kept], rows_of(features, kept))


def compared(draw: Draw, config: DenoiseConfig) -> Tensor:
    """Examples `[B]` (bool) whose captions are compared by the denoising error."""
    late = draw.timesteps >= config.denoise_itm_min_timestep
    return late if config.denoise_itm_coef > 0 else torch.zeros_like(late)


def preferred(draw: Draw, config: DenoiseConfig) -> Tensor:
    """Examples `[B]` (bool) whose pictures are."""
    late = draw.timesteps >= config.denoise_dpo_min_timestep
    return late if config.denoise_dpo_coef > 0 else torch.zeros_like(late)


def by_error(
    backbone: Backbone,
    batch: Encoded,
    draw: Draw,
    seen: Seen,
    blocks: Tensor,
    config: DenoiseConfig,
    reference: Tensor | None,
) -> dict[str, Tensor]:
    """The terms that compare denoising errors, as far as they are asked for.

    Each is a mean over the batch (that of the captions over both pictures of an example too), in which what does not
    exist, or is not asked at its timestep, counts as zero.

    Args:
        blocks: `[N]` block of each row of `seen`: OWN, and what is compared of HARD_CAPTION, HARD_IMAGE and TWIN.
        reference: of `reference_errors`.
    """
    terms, count = {}, len(batch)
    errors = _errors(backbone, batch, draw, seen.prediction, seen.images, blocks)
    if config.denoise_itm_coef > 0:
        text = compared(draw, config) & batch.has_hard_caption
        both = text & batch.hard_pair
        loss = denoise_itm_loss(
            torch.cat([errors[OWN, text], errors[TWIN, both]]),
            torch.cat([errors[HARD_CAPTION, text], errors[HARD_IMAGE, both]]),
            config.denoise_itm_temperature,
        )
        terms["loss_denoise_itm"] = loss.sum() / (2 * count)
    if reference is not None:
        asked = preferred(draw, config) & batch.has_hard_image
        pairs = (errors[OWN, asked], errors[HARD_IMAGE, asked], reference[OWN, asked], reference[HARD_IMAGE, asked])
        loss = denoise_dpo_loss(*pairs, config.denoise_dpo_temperature)
        terms["loss_denoise_dpo"] = loss.sum() / count
    return terms


def reference_errors(backbone: Backbone, batch: Encoded, draw: Draw, config: DenoiseConfig) -> Tensor | None:
    """`_errors` of the model without its LoRA: of OWN, and of HARD_IMAGE where pictures are compared. None: nowhere.

    For FSDP it goes before all passes with a graph, and OWN is whole, so that each process has something to predict.
    """
    if config.denoise_dpo_coef == 0:
        return None
    own = torch.arange(len(batch), device=draw.timesteps.device)
    hard = own[preferred(draw, config) & batch.has_hard_image]
    images = torch.cat([own, hard + len(batch)])
    blocks = torch.cat([torch.full_like(own, OWN), torch.full_like(hard, HARD_IMAGE)])
    noisy, timesteps = noised(backbone, batch, draw, images)
    with torch.no_grad(), lora_disabled(backbone):
        prediction, _ = backbone.predict(noisy, timesteps, batch.text.select(batch.caption[images % len(batch)]))
    return _errors(backbone, batch, draw, prediction, images, blocks)


def _errors(
    backbone: Backbone, batch: Encoded, draw: Draw, prediction: Tensor, images: Tensor, blocks: Tensor
) -> Tensor:
    """Error by block and example, `[TWIN + 1, B]`, of predictions for `[N]` rows of `latents`; else 0."""
    example = images % len(batch)
    timesteps = draw.timesteps[example]
    errors = prediction_error(prediction, backbone.target(batch.latents[images], draw.noise[example], timesteps))
    return errors.new_zeros(TWIN + 1, len(batch)).index_put((blocks, example), errors)


def noised(backbone: Backbone, batch: Encoded, draw: Draw, images: Tensor) -> tuple[Tensor, Tensor]:
    """z_t and t of rows of `latents`; noise and timestep are the example's, whatever is shown."""
    example = images % len(batch)
    timesteps = draw.timesteps[example]
    return backbone.add_noise(batch.latents[images], draw.noise[example], timesteps), timesteps


def rows_of(features: Features, rows: slice | Tensor) -> Features:
    return Features({tap: value[rows] for tap, value in features.maps.items()}, features.timesteps[rows])
