"""Outside judges of a picture and its text: the cosine of CLIP and SigLIP, and the two scores of BLIP.

They see pictures, not latents, and know nothing of the T2I model, so they may be asked about any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dpt_t2i.backbones.fingerprint import weights_hash
from dpt_t2i.backbones.image_text import UNREADABLE, cut_by, first_line, load_image_text
from dpt_t2i.backbones.loading import BUNDLED, quietly, resolve_device
from dpt_t2i.errors import InputError


@dataclass(frozen=True)
class PairScorer:
    """Scores pictures, each with a text; more is better, and only scores of one measure may be compared.

    `score` takes B pictures and lists of B texts, and gives for each list: measure -> `[B]` float32 on the CPU.
    """

    name: str  # as it was asked for
    measures: tuple[str, ...]  # such as `cosine`, or `itm` and `itc`
    fingerprint: Mapping[str, str]  # part -> hash of its weights
    score: Callable[[Sequence[Image.Image], Sequence[Sequence[str]]], list[Mapping[str, Tensor]]]
    cut: Callable[[Sequence[str]], list[str]]  # those of some texts that are too long to be read whole


def load_pair_scorer(name_or_path: str = BUNDLED, device: str = "auto") -> PairScorer:
    """`bundled`, or a folder or hub id of transformers' CLIP, SigLIP or BLIP for image-text retrieval.

    CLIP, SigLIP: `cosine` of the two vectors in [-1, 1]. BLIP: `itm`, the probability in [0, 1] that its matching head
    gives to "they match", and `itc`, the cosine (Li et al., 2022; the paper's BLIP-ITM and BLIP-ITC).

    Raises:
        InputError: nothing there that scores pictures and texts.
    """
    if name_or_path != BUNDLED and _model_type(name_or_path) == "blip":
        with quietly():
            return _blip(name_or_path, resolve_device(device))
    encoder = load_image_text(name_or_path, device)

    def score(pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[Mapping[str, Tensor]]:
        seen = encoder.images(pictures)
        return [{"cosine": (seen * encoder.texts(one)).sum(dim=1)} for one in texts]

    return PairScorer(name_or_path, ("cosine",), encoder.fingerprint, score, encoder.cut)


def _model_type(name: str) -> str:
    from transformers import AutoConfig

    try:
        with quietly():
            return str(AutoConfig.from_pretrained(name).model_type)
    except UNREADABLE as error:
        raise InputError(f"scorer `{name}` does not load: {first_line(error)}") from error


def _blip(name: str, device: torch.device) -> PairScorer:
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval

    try:
        loaded: Any = BlipForImageTextRetrieval.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        processor, tokenizer = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (*UNREADABLE, ImportError) as error:
        raise InputError(f"scorer `{name}` does not load: {first_line(error)}") from error
    model, found = loaded
    if absent := sorted(
        key for key in found["missing_keys"] if key.startswith(("itm_head", "vision_proj", "text_proj"))
    ):
        raise InputError(f"scorer `{name}` has no {absent[0].split('.')[0]}; give a BLIP for image-text retrieval")
    model = model.to(device).eval()
    limit = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def pairs(pixels: Tensor, texts: Sequence[str]) -> Mapping[str, Tensor]:
        words = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        inputs = {
            "pixel_values": pixels,
            "input_ids": words["input_ids"],
            "attention_mask": words["attention_mask"],
        }
        matched = model(**inputs, use_itm_head=True).itm_score  # [B, 2]: no, yes
        cosines = model(**inputs, use_itm_head=False).itm_score  # [B, B]: every picture with every text
        return {"itm": F.softmax(matched.float(), dim=1)[:, 1].cpu(), "itc": cosines.float().diagonal().cpu()}

    def score(pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[Mapping[str, Tensor]]:
        shown = processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
        return [pairs(shown["pixel_values"].to(device), one) for one in texts]

    hashes = {part: weights_hash(getattr(model, part)) for part in ("text_encoder", "vision_model")}
    fingerprint = {"text_encoder": hashes["text_encoder"], "image_encoder": hashes["vision_model"]}
    return PairScorer(name, ("itm", "itc"), fingerprint, score, cut_by(tokenizer, limit))
