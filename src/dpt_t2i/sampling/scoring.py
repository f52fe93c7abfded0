"""The model's own judgement of a latent: does it match the text?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.score import match_score
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import Tap, TextStates
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.noise import shared_noise


class MatchScorer:
    """`match_score` as a function of noised latents; the adapter is put into eval mode, its dropout is no judge."""

    def __init__(self, backbone: Backbone, adapter: DiscriminativeAdapter, taps: Sequence[Tap]) -> None:
        self.backbone = backbone
        self.adapter = adapter.eval()
        self.taps = tuple(taps)

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        """z_t `[B, C, h, w]`, t `[B]`, B texts -> scores `[B]` in [-1, 1]; differentiable in z_t."""
        return match_score(self.read(noisy, timesteps, text), text.pooled)

    def read(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> AdapterOutput:
        """All that the adapter says, from one pass up to the deepest tap."""
        output: AdapterOutput = self.adapter(self.backbone.features(noisy, timesteps, text, self.taps))
        return output

    @torch.no_grad()
    def score_images(
        self, latents: Tensor, text: TextStates, timestep: int, draws: int, seed: int, batch_size: int = 16
    ) -> Tensor:
        """Score clean latents, each against its own text: the mean over `draws` noises that all images share.

        Args:
            latents: `[B, C, h, w]`, as `encode_image` gives them or the sampler ends with.
            text: B texts.
            timestep: noise level at which the images are judged.
            seed: of the noises; the same (seed, draw) is the same noise in every call.
            batch_size: images in one pass; changes speed only.

        Returns:
            `[B]` float32 on the latents' device.

        Raises:
            InputError: the timestep is outside the schedule, or a score is not finite.
        """
        if not 0 <= timestep < self.backbone.num_train_timesteps:
            raise InputError(f"score_timestep {timestep} is not in 0..{self.backbone.num_train_timesteps - 1}")
        if not len(latents):
            return latents.new_zeros(0)
        rows = torch.arange(len(latents), device=latents.device)
        parts = [
            self._score_rows(latents[index], text.select(index), timestep, draws, seed)
            for index in rows.split(batch_size)
        ]
        scores = torch.cat(parts)
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).nonzero()[0])
            raise InputError(f"the matching score of image {bad} is NaN; use dtype float32")
        return scores

    def _score_rows(self, latents: Tensor, text: TextStates, timestep: int, draws: int, seed: int) -> Tensor:
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        scores = []
        for draw in range(draws):
            noise = shared_noise(seed, draw, latents.shape[1:]).to(latents.device).expand_as(latents)
            scores.append(self(self.backbone.add_noise(latents, noise, timesteps), timesteps, text).float())
        return torch.stack(scores).mean(dim=0)


@dataclass(frozen=True)
class Judge:
    """`score_images` with its settings fixed: one fair comparison is one judge."""

    scorer: MatchScorer
    timestep: int
    draws: int
    seed: int

    def __call__(self, latents: Tensor, text: TextStates) -> Tensor:
        """Clean latents `[B, C, h, w]` and B texts -> `[B]`."""
        return self.scorer.score_images(latents, text, self.timestep, self.draws, self.seed)
