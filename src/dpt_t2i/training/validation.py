"""Held-out figures of a run: ITM against hard negatives, REC, and the denoising loss.

Pictures are streamed, a few at a time; several processes do a part each and all know the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import DenoiseConfig
from dpt_t2i.data.records import Record
from dpt_t2i.evaluation.examples import Chunk, HeldOut, chunks
from dpt_t2i.evaluation.itm import itm_scores, itm_summary
from dpt_t2i.evaluation.rec import rec_ranks, rec_summary
from dpt_t2i.objectives.denoise import denoise_loss
from dpt_t2i.sampling.scoring import MatchScorer
from dpt_t2i.sampling.shares import gathered, share_of

TIMESTEP = 500  # of the paper's evaluation
DENOISE_AT = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the schedule: the loss differs tenfold between its ends


class Validation:
    """Calling it gives `itm_text itm_image rec_p1 rec_p5 rec_p10` (fractions) at one timestep, those that exist.

    Args:
        batch_size: examples at once; changes no figure.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: DiscriminativeAdapter,
        taps: Sequence[Tap],
        records: Sequence[Record],
        resolution: int,
        timestep: int = TIMESTEP,
        batch_size: int = 16,
    ) -> None:
        self.backbone, self.adapter, self.taps, self.timestep = backbone, adapter, taps, timestep
        self.records, self.resolution, self.batch_size = records, resolution, batch_size

    @property
    def examples(self) -> HeldOut:
        """This process's part."""
        return HeldOut(self.records, self.resolution, share_of(len(self.records), PartialState()))

    def __call__(self) -> dict[str, float]:
        mine, state = self.examples, PartialState()
        scorer = MatchScorer(self.backbone, self.adapter, self.taps)  # puts the adapter into eval mode
        with eval_mode(self.backbone.denoiser):
            # What is cut is told while it is trained on.
            how: dict[str, Any] = {"batch_size": self.batch_size, "on_truncate": "ignore"}
            scores = itm_scores(scorer, mine, [self.timestep], first=mine.first, **how)
            ranks = rec_ranks(scorer, mine, [self.timestep], first=mine.first_grounded, **how)
        itm = itm_summary(gathered(scores, state))[str(self.timestep)]
        figures = {f"itm_{side}": itm[side]["accuracy"] for side in ("text", "image") if side in itm}
        rec = rec_summary(gathered(ranks, state)).get(str(self.timestep), {})
        return figures | {f"rec_p{k}": rec[f"precision@{k}"]["accuracy"] for k in (1, 5, 10) if rec}

    def denoising(self, config: DenoiseConfig) -> dict[str, float]:
        """`loss_mse`: the training's denoising loss with full captions, at five timesteps and one noise an example.

        Noise and timesteps are the same at each call and for each arm, so that two runs can be compared.
        """
        mine, losses = self.examples, list[float]()
        with eval_mode(self.backbone.denoiser), torch.no_grad():
            for chunk in chunks(self.backbone, mine, self.batch_size, 0, mine.first):
                losses.extend(self._losses(chunk, config))
        everyone = gathered(losses, PartialState())
        return {"loss_mse": sum(everyone) / len(everyone)}

    def _losses(self, chunk: Chunk, config: DenoiseConfig) -> Iterator[float]:
        """One number an example and timestep."""
        backbone, clean, noise = self.backbone, chunk.latents, chunk.noise
        text = backbone.encode_text([example.caption for example in chunk.examples], "ignore")
        for share in DENOISE_AT:
            t = torch.full((len(clean),), int(share * backbone.num_train_timesteps), device=clean.device)
            predicted, _ = backbone.predict(backbone.add_noise(clean, noise, t), t, text)
            wanted, snr = backbone.target(clean, noise, t), backbone.snr(t)
            for row in range(len(clean)):
                yield float(self._loss(predicted[row], wanted[row], snr[row], config))

    def _loss(self, predicted: Tensor, wanted: Tensor, snr: Tensor, config: DenoiseConfig) -> Tensor:
        return denoise_loss(
            predicted[None],
            wanted[None],
            snr=snr[None],
            snr_gamma=config.snr_gamma,
            prediction_type=self.backbone.prediction_type,
        )


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Within, the module is in eval mode; then as it was before."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)
