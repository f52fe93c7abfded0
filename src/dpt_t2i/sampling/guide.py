"""One corrected step inside somebody else's pipeline: its latents, its text, its layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.config import CorrectionConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.correct import correct
from dpt_t2i.sampling.loop import is_corrected
from dpt_t2i.sampling.scoring import MatchScorer


@dataclass(frozen=True)
class Guide:
    """All that a correction inside a pipeline needs to know, and the correction itself."""

    backbone: Backbone
    scorer: MatchScorer
    config: CorrectionConfig
    text: TextStates  # P texts to obey
    size: tuple[int, int]  # (h, w) of the latents' map
    images: int | None  # latents that the pipeline works on, None = as many as a callback is given

    def wanted(self, position: int, steps: int) -> bool:
        """Is step `position` of `steps` to be corrected?"""
        return is_corrected(position, steps, self.config)

    def correct(self, latents: Tensor, timestep: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """z^_t of the denoiser's input, both in the pipeline's own layout, and the scores `[B]`.

        Args:
            latents: B denoiser inputs, any dtype.
            timestep: [] as the backbone counts it.
            tokens: what the pipeline gives the denoiser as text; its last B rows are the conditional ones. Taken in
                place of our own where it has the same shape, so that weighted prompts are judged as they are drawn.
        """
        call = self.backbone.pipeline_call
        if call.pack is not None:
            blank = latents.new_zeros(1, self.backbone.latent_channels, *self.size)
            self._require_size(latents.shape[1] == call.pack(blank).shape[1])
        z = latents if call.unpack is None else call.unpack(latents, *self.size)
        self.scorer.adapter.to(z.device)
        timesteps = timestep.to(z.device).expand(len(z))
        strength, rule = self.config.correct, self.config.correction_rule
        text = self._text_of(len(z), tokens).to(z.device)
        moved, scores = correct(z, timesteps, text, score=self.scorer, strength=strength, rule=rule)
        return moved if call.pack is None else call.pack(moved), scores

    def check_places(self, places: Tensor | None) -> None:
        """Refuse a picture of another shape than was told, by the places `[N, 3]` of its tokens (FLUX's `img_ids`)."""
        if places is not None:
            rows, columns = (int(places[..., axis].max()) + 1 for axis in (1, 2))
            self._require_size(rows * self.size[1] == columns * self.size[0])

    def _require_size(self, fits: bool) -> None:
        if not fits:
            height, width = (side * self.backbone.vae_scale for side in self.size)
            raise InputError(
                f"the pipeline draws another size than the {height} x {width} pixels that self-correction was told; "
                "give it the `height` and `width` of the call"
            )

    def _text_of(self, images: int, tokens: Tensor | None) -> TextStates:
        """A text for each image; pipelines lay out all the images of a prompt one after the other."""
        prompts = len(self.text)
        if images % prompts:
            raise InputError(
                f"the pipeline makes {images} images, but self-correction was given {prompts} prompts; give it the "
                "very prompts of the call"
            )
        index = torch.arange(prompts, device=self.text.tokens.device).repeat_interleave(images // prompts)
        text = self.text.select(index)
        if tokens is None or tokens[-images:].shape != text.tokens.shape:
            return text
        return replace(text, tokens=tokens[-images:].detach().float())
