"""Self-correction learned: the LoRA is shown what the corrected base would have predicted.

A correction while sampling climbs the model's own matching score, and costs a pass in every step. The same push can be
a target: classifier guidance (Dhariwal and Nichol, 2021) by the adapter of stage 1, distilled (Meng et al., 2023) into
the LoRA, so that it draws as if corrected at the price of a plain step. Nobody outside judges: base and adapter are
frozen and the model's own. Not in the paper; see docs/deviations.md.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.lora import lora_disabled
from dpt_t2i.backbones.types import Tap, TextStates
from dpt_t2i.config import DistillConfig, TuneConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.correct import predict_and_correct
from dpt_t2i.sampling.scoring import MatchScorer
from dpt_t2i.training.sharding import sharding_asked
from dpt_t2i.training.validation import eval_mode


class Teacher:
    """The plain base, corrected by an adapter that learns nothing more.

    Where t >= `distill_min_timestep`, its estimate of the clean latent moves by sigma_t * strength * |z_t| up the
    gradient of the score; below, it is the plain base, which holds the LoRA to what the base draws well.

    Args:
        scorer: of an adapter that was trained on the plain base.
    """

    def __init__(self, backbone: Backbone, scorer: MatchScorer, config: DistillConfig) -> None:
        self.backbone, self.scorer, self.config = backbone, scorer, config

    @staticmethod
    def of(
        config: TuneConfig, backbone: Backbone, adapter: DiscriminativeAdapter, taps: Sequence[Tap]
    ) -> Teacher | None:
        """None where the config asks for none. The scorer is `distill_adapter`, else a copy of `adapter` as it is now.

        Raises:
            InputError: the adapter to start from is not the plain base's, and no other is named; the adapter
                that is cannot be read, or is another base's; or FSDP.
        """
        settings = config.distill
        if settings.distill_coef == 0:
            return None
        if sharding_asked():
            raise InputError(
                "distill_coef does not go with FSDP: the score's gradient ends at the tap, FSDP waits for all"
            )
        if settings.distill_adapter is not None:
            plain = {**backbone.fingerprint(), "lora": None}
            scoring, _ = load_adapter(settings.distill_adapter, backbone.device, plain)
            return Teacher(backbone, MatchScorer.of(backbone, scoring.requires_grad_(False)), settings)
        of_a_lora = adapter.origin is not None and adapter.origin.base.get("lora") is not None
        if of_a_lora or config.model.lora not in (None, "none"):
            raise InputError(
                "distill_coef corrects the plain base, and this run starts from a LoRA or from an adapter that learned "
                "with one; give --distill_adapter RUN/adapter of the `dpt probe` run"
            )
        return Teacher(backbone, MatchScorer(backbone, copy.deepcopy(adapter).requires_grad_(False), taps), settings)

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        """z_t `[B, C, h, w]`, t `[B]`, B texts -> what should be predicted `[B, C, h, w]` float32, without a graph.

        Where the gradient of the score is not finite, what should be predicted is NaN: so is the loss then, and the
        engine names the step.
        """
        pushed = timesteps >= self.config.distill_min_timestep
        wanted = torch.empty_like(noisy, dtype=torch.float32)
        with eval_mode(self.backbone.denoiser), lora_disabled(self.backbone), torch.no_grad():
            for rows, find in ((pushed.nonzero()[:, 0], self._corrected), ((~pushed).nonzero()[:, 0], self._plain)):
                if len(rows):
                    wanted[rows] = find(noisy[rows], timesteps[rows], text.select(rows))
        return wanted

    def _plain(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        return self.backbone.predict(noisy, timesteps, text)[0].float()

    def _corrected(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        strength = self.config.distill_strength
        try:
            prediction, moved, _ = predict_and_correct(
                noisy, timesteps, text, None, scorer=self.scorer, strength=strength, rule="relative"
            )
        except InputError:  # on this process alone, perhaps: all must come to the end of the step
            return torch.full_like(noisy, torch.nan, dtype=torch.float32)
        return prediction.float() + _change(self.backbone, moved - noisy, timesteps)


def _change(backbone: Backbone, push: Tensor, timesteps: Tensor) -> Tensor:
    """By how much a prediction changes when the clean latent that it stands for moves by sigma_t * push at fixed z_t.

    z = alpha x + sigma n: x moves by sigma p and n by -alpha p, whatever of the two is predicted: what is, is linear.
    """
    ones, none = torch.ones_like(push), torch.zeros_like(push)
    alpha, sigma = backbone.add_noise(ones, none, timesteps), backbone.add_noise(none, ones, timesteps)
    return backbone.target(sigma * push, -alpha * push, timesteps)
