"""Held-out figures of a run: ITM against hard negatives and REC, at the paper's timestep."""

from __future__ import annotations

from collections.abc import Sequence

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import Tap
from dpt_t2i.data.records import Record
from dpt_t2i.evaluation.examples import examples_of
from dpt_t2i.evaluation.itm import itm_scores, itm_summary
from dpt_t2i.evaluation.rec import rec_ranks, rec_summary
from dpt_t2i.sampling.scoring import MatchScorer

TIMESTEP = 500


class Validation:
    """Calling it gives `itm_text itm_image rec_p1 rec_p5 rec_p10` (fractions) at one timestep, those that exist."""

    def __init__(
        self,
        backbone: Backbone,
        adapter: DiscriminativeAdapter,
        taps: Sequence[Tap],
        records: Sequence[Record],
        resolution: int,
        timestep: int = TIMESTEP,
    ) -> None:
        self.backbone, self.adapter, self.taps, self.timestep = backbone, adapter, taps, timestep
        self.examples = list(examples_of(records, resolution))

    def __call__(self) -> dict[str, float]:
        scorer = MatchScorer(self.backbone, self.adapter, self.taps)  # puts the adapter into eval mode
        denoiser_mode = self.backbone.denoiser.training
        self.backbone.denoiser.eval()
        itm = itm_summary(itm_scores(scorer, self.examples, [self.timestep]))[str(self.timestep)]
        figures = {f"itm_{side}": itm[side]["accuracy"] for side in ("text", "image") if side in itm}
        rec = rec_summary(rec_ranks(scorer, self.examples, [self.timestep])).get(str(self.timestep), {})
        figures |= {f"rec_p{k}": rec[f"precision@{k}"]["accuracy"] for k in (1, 5, 10) if rec}
        self.backbone.denoiser.train(denoiser_mode)
        return figures
