"""Encoders of images and texts into one space: CLIP, SigLIP and their kin, or the bundled pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from dpt_t2i.backbones.fingerprint import weights_hash
from dpt_t2i.backbones.loading import BUNDLED, quietly, resolve_device
from dpt_t2i.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTextEncoder:
    """Unit vectors whose cosine says how well a picture and a text go together."""

    name: str
    fingerprint: Mapping[str, str]  # part -> hash of its weights; `text_encoder` where a T2I model may share it
    images: Callable[[Sequence[Image.Image]], Tensor]  # RGB, any size -> [B, D] float32 on the CPU
    texts: Callable[[Sequence[str]], Tensor]  # -> [B, D] float32 on the CPU


def load_image_text(name_or_path: str = BUNDLED, device: str = "auto") -> ImageTextEncoder:
    """`bundled`, a folder of transformers' CLIP or SigLIP, or a hub id of one.

    Raises:
        InputError: nothing there that embeds images and texts.
    """
    place = resolve_device(device)
    with quietly():
        return _bundled(place) if name_or_path == BUNDLED else _from_transformers(name_or_path, place)


def _bundled(device: torch.device) -> ImageTextEncoder:
    """The text encoder of the bundled base, and the image encoder that was trained with it."""
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    bundled = Path(str(files("dpt_t2i") / "bundled"))
    tokenizer = CLIPTokenizer.from_pretrained(bundled / "base" / "tokenizer")
    text = CLIPTextModel.from_pretrained(bundled / "base" / "text_encoder", dtype=torch.float32).to(device).eval()
    folder = bundled / "image_encoder"
    vision = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    projection = load_file(folder / "text_projection.safetensors")["text_projection.weight"].float().to(device)
    side, warn = vision.config.image_size, cut_warning(BUNDLED, tokenizer, tokenizer.model_max_length)

    def pixels(image: Image.Image) -> Tensor:
        square = np.asarray(ImageOps.fit(image.convert("RGB"), (side, side)), dtype=np.float32)
        return torch.from_numpy(square.copy()).permute(2, 0, 1) / 127.5 - 1

    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        return _unit(vision(torch.stack([pixels(picture) for picture in pictures]).to(device)).image_embeds)

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        warn(captions)
        ids = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        eos = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        states = text(ids).last_hidden_state
        return _unit(states[torch.arange(len(ids), device=device), eos] @ projection.T)

    hashes = {"text_encoder": weights_hash(text), "image_encoder": weights_hash(vision)}
    return ImageTextEncoder(BUNDLED, hashes, images, texts)


def _from_transformers(name: str, device: torch.device) -> ImageTextEncoder:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        processor, tokenizer = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except ImportError as error:
        sentencepiece = any(part in str(error).lower() for part in ("sentencepiece", "protobuf"))  # the first SigLIP's
        mend = 'its tokenizer needs pip install "dpt-t2i[siglip]"' if sentencepiece else first_line(error)
        raise InputError(f"encoder `{name}` does not load: {mend}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"encoder `{name}` does not load: {first_line(error)}") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise InputError(f"encoder `{name}` does not embed images and texts; give a CLIP or SigLIP folder or hub id")
    limit = model.config.text_config.max_position_embeddings
    warn = cut_warning(name, tokenizer, limit)

    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
        return _unit(_pooled(model.get_image_features(pixel_values=inputs["pixel_values"].to(device))))

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        warn(captions)
        # SigLIP was trained on padded texts, and asks for padding; to CLIP it makes no difference.
        inputs = tokenizer(list(captions), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        return _unit(_pooled(model.get_text_features(**inputs.to(device))))

    hashes = {part: weights_hash(getattr(model, part)) for part in ("text_model", "vision_model")}
    return ImageTextEncoder(
        name, {"text_encoder": hashes["text_model"], "image_encoder": hashes["vision_model"]}, images, texts
    )


def cut_warning(name: str, tokenizer: Any, limit: int) -> Callable[[Sequence[str]], None]:
    """For texts before they are encoded: the first that is longer than `limit` tokens is a warning, and no other."""
    told = False

    def look(texts: Sequence[str]) -> None:
        nonlocal told
        if told:
            return
        with quietly():  # tokenizers warn of the length in their own words
            lengths = [len(ids) for ids in tokenizer(list(texts)).input_ids]
        if max(lengths, default=0) > limit:
            told = True
            longest = texts[lengths.index(max(lengths))]
            logger.warning(
                "encoder `%s` reads %d tokens of a text; longer ones are cut: `%.60s...`", name, limit, longest
            )

    return look


def first_line(error: Exception) -> str:
    """What an error says, without what stands below."""
    return str(error).strip().splitlines()[0]


def _pooled(output: Any) -> Tensor:
    """A tensor in some versions of transformers, an output that holds it in others."""
    pooled: Tensor = getattr(output, "pooler_output", output)
    return pooled


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1).cpu()
