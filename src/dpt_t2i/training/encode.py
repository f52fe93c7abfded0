"""From a batch of pixels and words to what the denoiser and the adapter read."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from accelerate import PartialState
from torch import Tensor

from dpt_t2i.adapter.grounding_text import GroundingTextEncoder
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.text import TOLD
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.data.examples import Batch
from dpt_t2i.errors import InputError
from dpt_t2i.files import write_text
from dpt_t2i.objectives.positions import positive_map
from dpt_t2i.objectives.types import GroundingTargets
from dpt_t2i.sampling.shares import gathered
from dpt_t2i.training.cached import CachedEncodings

log = logging.getLogger(__name__)

SHOWN = 10  # cut texts that the log names
KEPT = 10_000  # that the run folder names; a large corpus of long captions would fill the memory


@dataclass(frozen=True)
class Encoded:
    """B examples on the device. Rows of `latents` and of `text` are shared by all that show the same thing."""

    latents: Tensor  # [3 B, C, h, w]: the examples' images, the hard negatives', the random ones'; 0 for none
    text: TextStates  # U distinct texts
    caption: Tensor  # [B] rows of `text`
    hard_caption: Tensor  # [B]
    random_caption: Tensor  # [B]
    expression: Tensor  # [B]
    null: Tensor  # [1] row of the empty text
    has_hard_image: Tensor  # [B] bool
    has_hard_caption: Tensor  # [B] bool
    hard_pair: Tensor  # [B] bool: the hard caption is true of the hard image
    grounding_tokens: Tensor  # [B, L, D] token states of the expressions, of the grounding encoder
    grounding_mask: Tensor  # [B, L] bool
    targets: GroundingTargets
    records: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.caption)


class Encoder:
    """Frozen encoders of images and texts. Images are encoded to the mean of the VAE's posterior.

    Args:
        backbone: the T2I model.
        num_token_classes: K of the soft-token classifier.
        grounding: encoder of expressions; None = the T2I model's own token states.
        vae_batch_size: images in one pass of the VAE, whose memory grows with them (three an example).
        cached: where latents and text states are looked for first.
        skip_bad: mask the grounding of an expression whose span touches no token.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_token_classes: int,
        grounding: GroundingTextEncoder | None,
        vae_batch_size: int = 8,
        cached: CachedEncodings | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.backbone, self.num_token_classes, self.grounding = backbone, num_token_classes, grounding
        self.vae_batch_size, self.cached, self.skip_bad = vae_batch_size, cached, skip_bad
        self.cut: dict[str, str] = {}  # texts over the encoder's limit -> what of them is not read
        self._unseen = False  # whether a hard caption was left out that the text encoder cannot tell from the true one
        self._untouched: set[str] = set()  # what was said of spans that touch no token

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Encoded:
        """Encode one batch: images a few at a time, every distinct text once.

        Raises:
            InputError: the spans of an expression touch no token, and it may not be left out.
        """
        device = self.backbone.device
        columns = (batch.captions, batch.hard_captions, batch.random_captions, batch.expressions)
        texts = list(dict.fromkeys(["", *(text for column in columns for text in column)]))
        row = {text: index for index, text in enumerate(texts)}
        rows = [torch.tensor([row[text] for text in column], device=device) for column in columns]
        states = self._text(texts) if self.cached is None else self.cached.text_of(texts, self._text)
        self._note_cut(texts)
        alike = states.alike(rows[0], rows[1])
        self._note_alike(batch, alike)
        tokens, mask, offsets = self._ground(batch.expressions, states, rows[3])
        return Encoded(
            latents=self._latents(batch),
            text=states,
            caption=rows[0],
            hard_caption=rows[1],
            random_caption=rows[2],
            expression=rows[3],
            null=torch.tensor([row[""]], device=device),
            has_hard_image=batch.has_hard_image.to(device),
            has_hard_caption=batch.has_hard_caption.to(device) & ~alike,
            hard_pair=batch.hard_pair.to(device) & ~alike,
            grounding_tokens=tokens,
            grounding_mask=mask,
            targets=self._targets(batch, offsets).to(device),
            records=batch.records,
        )

    def _text(self, texts: Sequence[str]) -> TextStates:
        return self.backbone.encode_text(texts, "ignore")

    def _note_cut(self, texts: Sequence[str]) -> None:
        """Keep the texts that are over the limit; the log names the first few of a run."""
        for text, offsets in zip(texts, self.backbone.token_offsets(texts), strict=True):
            end = max(end for _, end in offsets)
            if end < len(text.rstrip()) and text not in self.cut and len(self.cut) < KEPT:
                self.cut[text] = text[end:].strip()
                if len(self.cut) <= SHOWN:
                    lost, whole = (shorten(part, TOLD, placeholder=" ...") for part in (text[end:], text))
                    log.warning("longer than the text encoder reads: cut is `%s` of `%s`", lost, whole)

    def _note_alike(self, batch: Batch, alike: Tensor) -> None:
        """Tell the first hard caption that is the caption itself to the text encoder: it is left out."""
        pairs = zip(batch.captions, batch.hard_captions, batch.has_hard_caption.tolist(), strict=True)
        likely = any(
            is_there and (hard in self.cut or hard.casefold() == own.casefold()) for own, hard, is_there in pairs
        )
        if self._unseen or not likely:  # a look at the device would wait for it, batch after batch
            return
        for index in (alike.cpu() & batch.has_hard_caption.cpu()).nonzero().flatten().tolist():
            self._unseen = True
            text = shorten(batch.hard_captions[index], TOLD, placeholder=" ...")
            log.warning("hard captions that the text encoder reads as the true one are left out, such as `%s`", text)
            break

    def _latents(self, batch: Batch) -> Tensor:
        """Of all pictures that are there; a negative that does not exist costs no pass."""
        exists = torch.cat([torch.ones_like(batch.has_hard_image), batch.has_hard_image, batch.has_random_image])
        images = torch.cat([batch.images, batch.hard_images, batch.random_images])[exists]
        found = self._encode(images) if self.cached is None else self.cached.latents_of(images, self._encode)
        latents = found.new_zeros(len(exists), *found.shape[1:])
        latents[exists.to(found.device)] = found
        return latents

    def _encode(self, images: Tensor) -> Tensor:
        parts = (
            self.backbone.encode_image(part.to(self.backbone.device)) for part in images.split(self.vae_batch_size)
        )
        return torch.cat(list(parts))

    def _ground(
        self, expressions: Sequence[str], states: TextStates, rows: Tensor
    ) -> tuple[Tensor, Tensor, Sequence[Sequence[tuple[int, int]]]]:
        if self.grounding is not None:
            text = self.grounding(expressions)
            return text.tokens, text.mask, text.offsets
        own = states.select(rows)
        return own.tokens, own.mask, self.backbone.token_offsets(expressions)

    def _targets(self, batch: Batch, offsets: Sequence[Sequence[tuple[int, int]]]) -> GroundingTargets:
        boxes, maps = list(batch.boxes), []
        for index, spans in enumerate(batch.spans):
            try:
                maps.append(positive_map(offsets[index], [[span] for span in spans], self.num_token_classes))
            except InputError as error:
                said = f"record {batch.records[index]}, {batch.expressions[index]!r}: {error}"
                if not self.skip_bad:
                    raise InputError(said) from error
                self._say(said)
                boxes[index] = boxes[index][:0]
                maps.append(positive_map(offsets[index], (), self.num_token_classes))
        return GroundingTargets(boxes=tuple(boxes), positive_map=tuple(maps))

    def _say(self, message: str) -> None:
        if message not in self._untouched:
            self._untouched.add(message)
            log.warning("grounding left out (%d so far): %s", len(self._untouched), message)


def report_cut(encoder: Encoder, folder: Path) -> None:
    """Say how many of the texts that all processes saw were cut, and write which to `cut_texts.jsonl`.

    What the file names already, of the part of a run that was stopped, stays; at most `KEPT` texts are named.
    """
    state = PartialState()
    cut = dict(gathered(list(encoder.cut.items())[: KEPT // state.num_processes], state))
    if cut and state.is_main_process:
        file = folder / "cut_texts.jsonl"
        cut |= _named_before(file)
        named = sorted(cut.items())[:KEPT]
        lines = [json.dumps({"text": text, "cut": lost}, ensure_ascii=False) for text, lost in named]
        write_text(file, "\n".join(lines) + "\n")
        many = f"at least {KEPT}" if len(cut) >= KEPT else f"{len(cut)}"
        log.warning("%s texts were over the text encoder's limit and cut; %s names them", many, file)


def _named_before(file: Path) -> dict[str, str]:
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {row["text"]: row["cut"] for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # there is none, or a kill cut it short
