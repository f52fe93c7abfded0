"""What is learned in a step: six evaluations of an example, the losses on them, and nothing of loops or devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpt_t2i.adapter.model import DiscriminativeAdapter, module_name
from dpt_t2i.adapter.score import match_score
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora import lora_disabled
from dpt_t2i.backbones.reader import gradient_cut
from dpt_t2i.backbones.types import Features, Tap
from dpt_t2i.config import DenoiseConfig, DistillConfig, ItmRecConfig
from dpt_t2i.objectives.denoise import denoise_dpo_loss, denoise_itm_loss, denoise_loss, prediction_error
from dpt_t2i.objectives.itm import itm_loss
from dpt_t2i.objectives.rec import rec_losses
from dpt_t2i.training.distill import Teacher
from dpt_t2i.training.encode import Encoded


@dataclass(frozen=True)
class Draw:
    """The randomness of a micro-batch, the same however the batch is split over processes."""

    noise: Tensor  # [B, C, h, w] shared by all evaluations of an example
    timesteps: Tensor  # [B] likewise
    drop_caption: Tensor  # [B] bool: the denoising term sees the empty text


class _Stage1(nn.Module):
    """One batched pass to the taps, in which the denoiser takes no gradient, and every reader's losses on it.

    Evaluations of an example, in this order of blocks: (i, t), (i, t_hard), (i, t_rand), (i_hard, t), (i_rand, t),
    (i, expression); rows whose negative does not exist are left out of the pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        readers: Sequence[DiscriminativeAdapter],
        taps: Sequence[Tap],
        loss: ItmRecConfig,
    ) -> None:
        super().__init__()
        self.backbone, self.readers, self.taps, self.loss = backbone, tuple(readers), tuple(taps), loss

    def forward(self, batch: Encoded, draw: Draw, num_boxes: float) -> dict[str, Tensor]:
        """Unweighted loss terms by name, each a sum over the readers, so that each gets the gradient that it would get
        alone. `num_boxes`: boxes of the whole optimiser step / its micro-batches."""
        plan = _Plan(batch)
        with torch.no_grad():
            features = _features(self.backbone, self.taps, batch, draw, plan.images, plan.texts)
        return discriminate(self.readers, features, plan, batch, num_boxes, self.loss)


class ProbeObjective(_Stage1):
    """Stage 1: ITM and REC by one adapter."""

    def __init__(
        self, backbone: Backbone, adapter: DiscriminativeAdapter, taps: Sequence[Tap], loss: ItmRecConfig
    ) -> None:
        super().__init__(backbone, (adapter,), taps, loss)
        self.adapter = adapter


class AtlasObjective(_Stage1):
    """Stage 1 on many taps: one pass up to the deepest feeds an adapter at each.

    Args:
        adapters: tap name -> the adapter that reads it, all of the same sizes.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Mapping[str, DiscriminativeAdapter],
        taps: Sequence[Tap],
        loss: ItmRecConfig,
    ) -> None:
        super().__init__(backbone, tuple(adapters.values()), taps, loss)
        self.adapters = nn.ModuleDict({module_name(tap): adapter for tap, adapter in adapters.items()})


class TuneObjective(nn.Module):
    """Stage 2: one full pass for the positive, one pass to the tap for the other five; ITM + REC + denoising.

    Examples with a dropped caption get one more row in the full pass, whose text is empty. With a teacher the example's
    picture goes through the full pass under its two wrong captions too, and all three predictions are held to the
    teacher's. With `denoise_itm_coef` the picture and its hard negative go through it under both of their captions, and
    each must be predicted better under its own.

    Args:
        cut: block behind which the denoising loss sends no gradient into its map (`detach_unet_feature`).
        teacher: what a corrected step would predict; None = there is no such loss.
        share: of the gradient of ITM and REC that goes on behind the maps, into the denoiser.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: DiscriminativeAdapter,
        taps: Sequence[Tap],
        loss: ItmRecConfig,
        denoise: DenoiseConfig,
        cut: Tap | None = None,
        teacher: Teacher | None = None,
        share: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone, self.adapter, self.taps, self.loss, self.denoise = backbone, adapter, tuple(taps), loss, denoise
        self.cut, self.teacher, self.share = cut, teacher, share
        self.denoiser = backbone.denoiser  # registered here so that wrappers see the LoRA

    def forward(self, batch: Encoded, draw: Draw, num_boxes: float) -> dict[str, Tensor]:
        """Unweighted loss terms by name: `loss_mse` too, and `loss_denoise_itm` and `loss_distill` where asked for."""
        plan, count = _Plan(batch), len(batch)
        compared, preferred = _compared(draw, self.denoise), _preferred(draw, self.denoise)
        reference = _reference(self.backbone, batch, draw, self.denoise)
        held = torch.full_like(compared, self.teacher is not None)
        whole = plan.is_of(OWN) | plan.is_of(HARD_CAPTION, compared | held)
        whole |= plan.is_of(RANDOM_CAPTION, held) | plan.is_of(HARD_IMAGE, compared | preferred)
        twins = (compared & batch.has_hard_caption & batch.has_hard_image).nonzero()[:, 0]
        more = whole.nonzero()[count:, 0]
        images, texts = plan.images[more], plan.texts[more]
        images, texts = torch.cat([images, twins + count]), torch.cat([texts, batch.hard_caption[twins]])
        mse, seen = denoising(self.backbone, self.taps, batch, draw, self.denoise, self.cut, (images, texts))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.share > 0):
            others = _features(self.backbone, self.taps, batch, draw, plan.images[~whole], plan.texts[~whole])
        read = _stack(_rows(seen.features, slice(0, count + len(more))), others)
        if not whole[: count + len(more)].all():  # back to the order of the plan
            read = _rows(read, torch.cat([whole.nonzero()[:, 0], (~whole).nonzero()[:, 0]]).argsort())
        terms = discriminate((self.adapter,), _damped(read, self.share), plan, batch, num_boxes, self.loss)
        terms |= {"loss_mse": mse}
        blocks = torch.cat([plan.blocks[whole], torch.full_like(twins, TWIN)])
        terms |= _by_error(self.backbone, batch, draw, seen, blocks, self.denoise, reference)
        if self.teacher is not None:
            rows = (blocks <= RANDOM_CAPTION).nonzero()[:, 0]
            wanted = self.teacher(seen.noisy[rows], seen.timesteps[rows], batch.text.select(seen.texts[rows]))
            terms |= {"loss_distill": denoise_loss(seen.prediction[rows], wanted)}
        return terms


class DenoiseObjective(nn.Module):
    """A LoRA without an adapter: on the denoising loss alone, the control arm, or on matching by its error too."""

    def __init__(self, backbone: Backbone, denoise: DenoiseConfig, cut: Tap | None = None) -> None:
        super().__init__()
        self.backbone, self.denoise, self.cut = backbone, denoise, cut
        self.denoiser = backbone.denoiser

    def forward(self, batch: Encoded, draw: Draw, num_boxes: float) -> dict[str, Tensor]:
        """`loss_mse`, and the terms by the error that are asked for; boxes are not looked at."""
        count, compared, preferred = len(batch), _compared(draw, self.denoise), _preferred(draw, self.denoise)
        reference = _reference(self.backbone, batch, draw, self.denoise)
        own = torch.arange(count, device=compared.device)
        hard = own[compared & batch.has_hard_caption]
        others = own[(compared & batch.has_hard_caption | preferred) & batch.has_hard_image]
        twins = own[compared & batch.has_hard_caption & batch.has_hard_image]
        images = torch.cat([hard, others + count, twins + count])
        texts = torch.cat([batch.hard_caption[hard], batch.caption[others], batch.hard_caption[twins]])
        mse, seen = denoising(self.backbone, (), batch, draw, self.denoise, self.cut, (images, texts))
        parts = ((own, OWN), (hard, HARD_CAPTION), (others, HARD_IMAGE), (twins, TWIN))
        blocks = torch.cat([torch.full_like(rows, block) for rows, block in parts])
        return {"loss_mse": mse} | _by_error(self.backbone, batch, draw, seen, blocks, self.denoise, reference)


def weights_of(
    loss: ItmRecConfig, denoise: DenoiseConfig | None = None, distill: DistillConfig | None = None
) -> dict[str, float]:
    """Weight of each named term."""
    return {
        "loss_i2t": loss.itm_coef,
        "loss_t2i": loss.itm_coef,
        "loss_ce": loss.ce_coef,
        "loss_bbox": loss.bbox_coef,
        "loss_giou": loss.giou_coef,
        "loss_align": loss.align_coef,
        "loss_mse": denoise.mse_loss_coef if denoise else 1.0,
        "loss_denoise_itm": denoise.denoise_itm_coef if denoise else 0.0,
        "loss_denoise_dpo": denoise.denoise_dpo_coef if denoise else 0.0,
        "loss_distill": distill.distill_coef if distill else 0.0,
    }


def discriminate(
    adapters: Sequence[DiscriminativeAdapter],
    features: Features,
    plan: _Plan,
    batch: Encoded,
    num_boxes: float,
    loss: ItmRecConfig,
) -> dict[str, Tensor]:
    """ITM on the first five blocks, REC on the last; each term is a sum over the adapters, which read their own taps.

    The losses own no parameters, so they look at all adapters at once, as at one batch.
    """
    count, many = len(batch), len(adapters)
    split = len(features) - count
    # A block at a time: as fast on a CPU as all at once, and what a layer needs in passing is a fifth of it.
    blocks = [_rows(features, slice(start, min(start + count, split))) for start in range(0, split, count)]
    asked = _rows(features, slice(split, None))
    pooled = batch.text.select(plan.texts[:split]).pooled
    found = torch.stack(
        [match_score(torch.cat([adapter.match_embeds(block) for block in blocks]), pooled) for adapter in adapters]
    )  # [A, rows]
    grounding = AdapterOutput.cat(
        [adapter(asked, batch.grounding_tokens, batch.grounding_mask) for adapter in adapters]
    )
    kept = plan.kept[: 5 * count].expand(many, -1)
    scores = found.new_zeros(kept.shape).masked_scatter(kept, found).unflatten(1, (5, count))
    scores = scores.transpose(0, 1).flatten(1)  # [5, A B]
    has_caption, has_image = batch.has_hard_caption.repeat(many), batch.has_hard_image.repeat(many)
    exists = torch.ones_like(has_image)
    itm = itm_loss(
        torch.stack([scores[0], scores[1], scores[2]], dim=1),
        torch.stack([scores[0], scores[3], scores[4]], dim=1),
        grounding.logit_scale,
        torch.stack([exists, has_caption, exists], dim=1),
        torch.stack([exists, has_image, exists], dim=1),
    )
    rec = rec_losses(
        grounding,
        batch.targets.repeated(many),
        num_boxes,
        eos_coef=loss.eos_coef,
        temperature=loss.align_temperature,
    )
    return {name: many * value for name, value in itm.items()} | rec


def _compared(draw: Draw, config: DenoiseConfig) -> Tensor:
    """Examples `[B]` (bool) whose captions are compared by the denoising error."""
    late = draw.timesteps >= config.denoise_itm_min_timestep
    return late if config.denoise_itm_coef > 0 else torch.zeros_like(late)


def _preferred(draw: Draw, config: DenoiseConfig) -> Tensor:
    """Examples `[B]` (bool) whose pictures are."""
    late = draw.timesteps >= config.denoise_dpo_min_timestep
    return late if config.denoise_dpo_coef > 0 else torch.zeros_like(late)


def _by_error(
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
        reference: of `_reference`.
    """
    terms, count = {}, len(batch)
    errors = _errors(backbone, batch, draw, seen.prediction, seen.images, blocks)
    if config.denoise_itm_coef > 0:
        text = _compared(draw, config) & batch.has_hard_caption
        both = text & batch.has_hard_image
        loss = denoise_itm_loss(
            torch.cat([errors[OWN, text], errors[TWIN, both]]),
            torch.cat([errors[HARD_CAPTION, text], errors[HARD_IMAGE, both]]),
            config.denoise_itm_temperature,
        )
        terms["loss_denoise_itm"] = loss.sum() / (2 * count)
    if reference is not None:
        asked = _preferred(draw, config) & batch.has_hard_image
        pairs = (errors[OWN, asked], errors[HARD_IMAGE, asked], reference[OWN, asked], reference[HARD_IMAGE, asked])
        loss = denoise_dpo_loss(*pairs, config.denoise_dpo_temperature)
        terms["loss_denoise_dpo"] = loss.sum() / count
    return terms


def _reference(backbone: Backbone, batch: Encoded, draw: Draw, config: DenoiseConfig) -> Tensor | None:
    """`_errors` of the model without its LoRA: of OWN, and of HARD_IMAGE where pictures are compared. None: nowhere.

    For FSDP it goes before all passes with a graph, and OWN is whole, so that each process has something to predict.
    """
    if config.denoise_dpo_coef == 0:
        return None
    own = torch.arange(len(batch), device=draw.timesteps.device)
    hard = own[_preferred(draw, config) & batch.has_hard_image]
    images, blocks = torch.cat([own, hard + len(batch)]), torch.cat([own * 0 + OWN, hard * 0 + HARD_IMAGE])
    noisy, timesteps = _noised(backbone, batch, draw, images)
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
    noisy, timesteps = _noised(backbone, batch, draw, images)
    with gradient_cut(backbone.denoiser, cut) if cut else nullcontext():
        prediction, features = backbone.predict(noisy, timesteps, batch.text.select(told), taps)
    kept = slice(0, count + len(again))
    judged = prediction[:count].index_copy(0, dropped, prediction[kept.stop :])
    mse = denoise_loss(
        judged,
        backbone.target(batch.latents[:count], draw.noise, draw.timesteps),
        snr=backbone.snr(draw.timesteps),
        snr_gamma=config.snr_gamma,
        prediction_type=backbone.prediction_type,
    )
    return mse, Seen(images[kept], noisy[kept], timesteps[kept], told[kept], prediction[kept], _rows(features, kept))


@dataclass(frozen=True)
class Seen:
    """N rows of a full pass."""

    images: Tensor  # [N] rows of the batch's `latents`
    noisy: Tensor  # [N, C, h, w] z_t
    timesteps: Tensor  # [N]
    texts: Tensor  # [N] rows of the batch's `text`
    prediction: Tensor  # [N, C, h, w]
    features: Features  # at the taps


# Blocks of evaluations in a plan, and one that only the full pass knows: the hard image under the hard caption.
OWN, HARD_CAPTION, RANDOM_CAPTION, HARD_IMAGE, RANDOM_IMAGE, EXPRESSION, TWIN = range(7)


class _Plan:
    """Which image meets which text in each evaluation, and which evaluations take place."""

    def __init__(self, batch: Encoded) -> None:
        count, device = len(batch), batch.caption.device
        own = torch.arange(count, device=device)
        always = torch.ones_like(batch.has_hard_image)
        self.kept = torch.cat([always, batch.has_hard_caption, always, batch.has_hard_image, always, always])  # [6 B]
        self.images = torch.cat([own, own, own, own + count, own + 2 * count, own])[self.kept]  # rows of `latents`
        texts = (
            batch.caption,
            batch.hard_caption,
            batch.random_caption,
            batch.caption,
            batch.caption,
            batch.expression,
        )
        self.texts = torch.cat(texts)[self.kept]  # rows of `text`
        self.blocks = torch.arange(6, device=device).repeat_interleave(count)[self.kept]
        self.examples = self.images % count

    def is_of(self, block: int, examples: Tensor | None = None) -> Tensor:
        """Rows, as bool, of a block; of those examples `[B]` (bool) alone where given."""
        found = self.blocks == block
        return found if examples is None else found & examples[self.examples]


def _noised(backbone: Backbone, batch: Encoded, draw: Draw, images: Tensor) -> tuple[Tensor, Tensor]:
    """z_t and t of rows of `latents`; noise and timestep are the example's, whatever is shown."""
    example = images % len(batch)
    timesteps = draw.timesteps[example]
    return backbone.add_noise(batch.latents[images], draw.noise[example], timesteps), timesteps


def _features(
    backbone: Backbone, taps: Sequence[Tap], batch: Encoded, draw: Draw, images: Tensor, texts: Tensor
) -> Features:
    noisy, timesteps = _noised(backbone, batch, draw, images)
    return backbone.features(noisy, timesteps, batch.text.select(texts), taps)


def _damped(features: Features, share: float) -> Features:
    """The same maps, behind which only a share of the gradient goes on."""
    if share == 1:
        return features
    maps = {tap: value.detach() + share * (value - value.detach()) for tap, value in features.maps.items()}
    return Features(maps, features.timesteps)


def _rows(features: Features, rows: slice | Tensor) -> Features:
    return Features({tap: value[rows] for tap, value in features.maps.items()}, features.timesteps[rows])


def _stack(first: Features, second: Features) -> Features:
    maps = {tap: torch.cat([first.maps[tap], second.maps[tap]]) for tap in first.maps}
    return Features(maps, torch.cat([first.timesteps, second.timesteps]))
