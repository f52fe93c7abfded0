"""What is learned in a step: six evaluations of an example, the losses on them, and nothing of loops or devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dpt_t2i.adapter.model import DiscriminativeAdapter, module_name
from dpt_t2i.adapter.score import match_score
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import Features, Tap
from dpt_t2i.config import DenoiseConfig, DistillConfig, ItmRecConfig
from dpt_t2i.objectives.denoise import denoise_loss
from dpt_t2i.objectives.itm import itm_loss
from dpt_t2i.objectives.rec import rec_losses
from dpt_t2i.training.denoising import (
    HARD_CAPTION,
    HARD_IMAGE,
    OWN,
    RANDOM_CAPTION,
    TWIN,
    Draw,
    by_error,
    compared,
    denoising,
    noised,
    preferred,
    reference_errors,
    rows_of,
)
from dpt_t2i.training.distill import Teacher
from dpt_t2i.training.encode import Encoded


class _Stage1(nn.Module):
    """Two batched passes to the taps, in which the denoiser takes no gradient, and every reader's losses on them.

    Evaluations of an example, in this order of blocks: (i, t), (i, t_hard), (i, t_rand), (i_hard, t), (i_rand, t),
    (i, expression); rows whose negative does not exist are left out. The last block is the second pass.
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
        alone. `num_boxes`: boxes of the whole optimiser step / its micro-batches and processes."""
        plan = _Plan(batch)
        split = len(plan.images) - len(batch)
        with torch.no_grad():
            # Grounding's rows by themselves, as in the release: in another shape a sum rounds otherwise, and a unit
            # of the adapter that lies on its ReLU's kink then changes gradients by a percent.
            features = _joined(
                *(
                    _features(self.backbone, self.taps, batch, draw, plan.images[rows], plan.texts[rows])
                    for rows in (slice(split), slice(split, None))
                )
            )
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
    each must be predicted better under its own; the picture alone where the hard caption need not be true of the hard
    one. With `denoise_dpo_coef` the picture and its hard negative go through it under the picture's caption, and the
    picture must gain more on the base, which predicts both first.

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
        """Unweighted loss terms by name: `loss_mse` too; what compares errors and `loss_distill` where asked for."""
        plan, count = _Plan(batch), len(batch)
        by_text, by_image = compared(draw, self.denoise), preferred(draw, self.denoise)
        reference = reference_errors(self.backbone, batch, draw, self.denoise)
        whole = self._predicted(plan, by_text, by_text & batch.hard_pair | by_image)
        more = whole.nonzero()[count:, 0]  # behind the positives, which `denoising` takes by itself
        twins = (by_text & batch.hard_pair).nonzero()[:, 0]  # hard negatives under their own captions: not in the plan
        images = torch.cat([plan.images[more], twins + count])
        texts = torch.cat([plan.texts[more], batch.hard_caption[twins]])
        mse, seen = denoising(self.backbone, self.taps, batch, draw, self.denoise, self.cut, (images, texts))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.share > 0):
            others = _features(self.backbone, self.taps, batch, draw, plan.images[~whole], plan.texts[~whole])
        read = _merged(rows_of(seen.features, slice(0, count + len(more))), others, whole)
        terms = discriminate((self.adapter,), _damped(read, self.share), plan, batch, num_boxes, self.loss)
        terms |= {"loss_mse": mse}
        blocks = torch.cat([plan.blocks[whole], torch.full_like(twins, TWIN)])
        terms |= by_error(self.backbone, batch, draw, seen, blocks, self.denoise, reference)
        if self.teacher is not None:
            rows = (blocks <= RANDOM_CAPTION).nonzero()[:, 0]
            wanted = self.teacher(seen.noisy[rows], seen.timesteps[rows], batch.text.select(seen.texts[rows]))
            terms |= {"loss_distill": denoise_loss(seen.prediction[rows], wanted)}
        return terms

    def _predicted(self, plan: _Plan, hard_captions: Tensor, hard_images: Tensor) -> Tensor:
        """Rows of the plan (bool) that go through the whole denoiser: all positives, and negatives of those examples
        `[B]` (bool) whose predictions are compared or held to the teacher's. The others end at the tap."""
        held = torch.full_like(hard_captions, self.teacher is not None)
        rows = plan.is_of(OWN) | plan.is_of(HARD_CAPTION, hard_captions | held)
        return rows | plan.is_of(RANDOM_CAPTION, held) | plan.is_of(HARD_IMAGE, hard_images)


class DenoiseObjective(nn.Module):
    """A LoRA without an adapter: on the denoising loss alone, the control arm, or on matching by its error too."""

    def __init__(self, backbone: Backbone, denoise: DenoiseConfig, cut: Tap | None = None) -> None:
        super().__init__()
        self.backbone, self.denoise, self.cut = backbone, denoise, cut
        self.denoiser = backbone.denoiser

    def forward(self, batch: Encoded, draw: Draw, num_boxes: float) -> dict[str, Tensor]:
        """`loss_mse`, and the terms by the error that are asked for; boxes are not looked at."""
        count, by_text, by_image = len(batch), compared(draw, self.denoise), preferred(draw, self.denoise)
        reference = reference_errors(self.backbone, batch, draw, self.denoise)
        own = torch.arange(count, device=by_text.device)
        hard = own[by_text & batch.has_hard_caption]
        others = own[by_text & batch.hard_pair | by_image & batch.has_hard_image]
        twins = own[by_text & batch.hard_pair]
        images = torch.cat([hard, others + count, twins + count])
        texts = torch.cat([batch.hard_caption[hard], batch.caption[others], batch.hard_caption[twins]])
        mse, seen = denoising(self.backbone, (), batch, draw, self.denoise, self.cut, (images, texts))
        parts = ((own, OWN), (hard, HARD_CAPTION), (others, HARD_IMAGE), (twins, TWIN))
        blocks = torch.cat([torch.full_like(rows, block) for rows, block in parts])
        return {"loss_mse": mse} | by_error(self.backbone, batch, draw, seen, blocks, self.denoise, reference)


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
    blocks = [rows_of(features, slice(start, min(start + count, split))) for start in range(0, split, count)]
    asked = rows_of(features, slice(split, None))
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


def _features(
    backbone: Backbone, taps: Sequence[Tap], batch: Encoded, draw: Draw, images: Tensor, texts: Tensor
) -> Features:
    noisy, timesteps = noised(backbone, batch, draw, images)
    return backbone.features(noisy, timesteps, batch.text.select(texts), taps, pictures=images)


def _damped(features: Features, share: float) -> Features:
    """The same maps, behind which only a share of the gradient goes on."""
    if share == 1:
        return features
    maps = {tap: value.detach() + share * (value - value.detach()) for tap, value in features.maps.items()}
    return Features(maps, features.timesteps)


def _joined(*parts: Features) -> Features:
    """The rows of all, one part after another."""
    maps = {tap: torch.cat([part.maps[tap] for part in parts]) for tap in parts[0].maps}
    return Features(maps, torch.cat([part.timesteps for part in parts]))


def _merged(first: Features, second: Features, is_first: Tensor) -> Features:
    """All rows of both; `is_first` (bool) says of each whose it is."""
    stacked = _joined(first, second)
    if bool(is_first[: len(first)].all()):
        return stacked
    return rows_of(stacked, torch.cat([is_first.nonzero()[:, 0], (~is_first).nonzero()[:, 0]]).argsort())
