"""The model's own judgement of a latent: does it match the text?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.score import match_score
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import Features, Tap, TextStates
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.noise import shared_noise


class MatchScorer:
    """`match_score` as a function of noised latents; the adapter is put into eval mode, its dropout is no judge."""

    def __init__(self, backbone: Backbone, adapter: DiscriminativeAdapter, taps: Sequence[Tap]) -> None:
        self.backbone = backbone
        self.adapter = adapter.eval()
        self.taps = tuple(taps)

    @classmethod
    def of(cls, backbone: Backbone, adapter: DiscriminativeAdapter) -> MatchScorer:
        """The scorer of an adapter that reads its own taps.

        Raises:
            InputError: `backbone` has no such tap, or other widths than the adapter was made for.
        """
        taps = [backbone.parse_taps(name)[0] for name in adapter.tap_channels]
        widths = [(f"tap {tap.name}", adapter.tap_channels[tap.name], tap.channels) for tap in taps]
        widths.append(("the pooled text", adapter.pooled_dim, backbone.pooled_dim))
        for what, wanted, given in widths:
            if wanted != given:
                raise InputError(
                    f"the adapter reads {what} of width {wanted}, base `{backbone.name}` gives {given}; use the base "
                    "that it was trained on"
                )
        return cls(backbone, adapter, taps)

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        """z_t `[B, C, h, w]`, t `[B]`, B texts -> scores `[B]` in [-1, 1]; differentiable in z_t."""
        features = self.backbone.features(noisy, timesteps, text, self.taps)
        return match_score(self.adapter.match_embeds(features), text.pooled)

    def predict_and_score(
        self, noisy: Tensor, timesteps: Tensor, text: TextStates, scored: int
    ) -> tuple[Tensor, Tensor]:
        """The denoiser's predictions `[N, C, h, w]`, and the scores `[scored]` of the last rows, all of one pass.

        Only the scores have a graph: none is recorded behind the deepest tap, which would cost time and memory and
        lead nowhere.
        """
        with _graph_up_to(self.backbone.denoiser, [tap.module for tap in self.taps]):
            prediction, features = self.backbone.predict(noisy, timesteps, text, self.taps)
        maps = {name: map_[-scored:] for name, map_ in features.maps.items()}
        embeds = self.adapter.match_embeds(Features(maps, features.timesteps[-scored:]))
        return prediction.detach(), match_score(embeds, text.pooled[-scored:])

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
        check_score_timestep(self.backbone, timestep)
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
            raise InputError(
                f"the matching score of image {bad} is NaN; use dtype float32, or if it is that, other weights"
            )
        return scores

    def _score_rows(self, latents: Tensor, text: TextStates, timestep: int, draws: int, seed: int) -> Tensor:
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        scores = []
        for draw in range(draws):
            noise = shared_noise(seed, draw, latents.shape[1:]).to(latents.device).expand_as(latents)
            scores.append(self(self.backbone.add_noise(latents, noise, timesteps), timesteps, text).float())
        return torch.stack(scores).mean(dim=0)


def check_score_timestep(backbone: Backbone, timestep: int) -> None:
    """Refuse a noise level that `backbone` does not have.

    Raises:
        InputError: that.
    """
    if not 0 <= timestep < backbone.num_train_timesteps:
        raise InputError(f"score_timestep {timestep} is not in 0..{backbone.num_train_timesteps - 1}")


@contextmanager
def _graph_up_to(denoiser: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Within one pass of `denoiser`, gradient mode is off once all the modules at `paths` have answered."""
    before, waiting = torch.is_grad_enabled(), set(paths)

    def reached(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            waiting.discard(path)
            if not waiting:
                torch.set_grad_enabled(False)

        return hook

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        torch.set_grad_enabled(before)  # what is done with the maps outside belongs to the graph

    handles = [denoiser.get_submodule(path).register_forward_hook(reached(path)) for path in paths]
    handles.append(denoiser.register_forward_hook(leave))
    try:
        yield
    finally:
        torch.set_grad_enabled(before)
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Judge:
    """`score_images` with its settings fixed: one fair comparison is one judge.

    Raises:
        InputError: the timestep is outside the schedule.
    """

    scorer: MatchScorer
    timestep: int
    draws: int
    seed: int

    def __post_init__(self) -> None:
        check_score_timestep(self.scorer.backbone, self.timestep)  # before anything is drawn

    def __call__(self, latents: Tensor, text: TextStates) -> Tensor:
        """Clean latents `[B, C, h, w]` and B texts -> `[B]`."""
        return self.scorer.score_images(latents, text, self.timestep, self.draws, self.seed)
