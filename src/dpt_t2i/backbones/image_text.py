"""Encoders of images and texts into one space: CLIP, SigLIP and their kin, or the bundled pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpt_t2i.backbones.fingerprint import weights_hash
from dpt_t2i.backbones.loading import BUNDLED, quietly, resolve_device
from dpt_t2i.errors import InputError

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)  # what broken model folders end in


@dataclass(frozen=True)
class ImageTextEncoder:
    """Unit vectors whose cosine says how well a picture and a text go together."""

    name: str
    fingerprint: Mapping[str, str]  # part -> hash of its weights; `text_encoder` where a T2I model may share it
    images: Callable[[Sequence[Image.Image]], Tensor]  # RGB, any size -> [B, D] float32 on the CPU
    texts: Callable[[Sequence[str]], Tensor]  # -> [B, D] float32 on the CPU
    cut: Callable[[Sequence[str]], list[str]]  # those of some texts that are too long to be read whole


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
    side = vision.config.image_size

    def pixels(image: Image.Image) -> Tensor:
        square = np.asarray(ImageOps.fit(image.convert("RGB"), (side, side)), dtype=np.float32)
        return torch.from_numpy(square.copy()).permute(2, 0, 1) / 127.5 - 1

    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        return _unit(vision(torch.stack([pixels(picture) for picture in pictures]).to(device)).image_embeds)

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        ids = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        eos = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
        states = text(ids).last_hidden_state
        return _unit(states[torch.arange(len(ids), device=device), eos] @ projection.T)

    hashes = {"text_encoder": weights_hash(text), "image_encoder": weights_hash(vision)}
    return ImageTextEncoder(BUNDLED, hashes, images, texts, cut_by(tokenizer, tokenizer.model_max_length))


def _from_transformers(name: str, device: torch.device) -> ImageTextEncoder:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        processor, tokenizer = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except ImportError as error:
        sentencepiece = any(part in str(error).lower() for part in ("sentencepiece", "protobuf"))  # the first SigLIP's
        mend = 'its tokenizer needs pip install "dpt-t2i[siglip]"' if sentencepiece else first_line(error)
        raise InputError(f"encoder `{name}` does not load: {mend}") from error
    except UNREADABLE as error:
        raise InputError(f"encoder `{name}` does not load: {first_line(error)}") from error
    parts = ("get_image_features", "get_text_features", "vision_model", "text_model")
    if not all(hasattr(model, part) for part in parts):
        raise InputError(f"encoder `{name}` does not embed images and texts; give a CLIP or SigLIP folder or hub id")
    limit = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        inputs = processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
        return _unit(_pooled(model.get_image_features(pixel_values=inputs["pixel_values"].to(device))))

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        # SigLIP was trained on padded texts, and asks for padding; to CLIP it makes no difference.
        inputs = tokenizer(list(captions), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        return _unit(_pooled(model.get_text_features(**inputs.to(device))))

    hashes = {part: weights_hash(getattr(model, part)) for part in ("text_model", "vision_model")}
    fingerprint = {"text_encoder": hashes["text_model"], "image_encoder": hashes["vision_model"]}
    return ImageTextEncoder(name, fingerprint, images, texts, cut_by(tokenizer, limit))


def cut_by(tokenizer: Any, limit: int) -> Callable[[Sequence[str]], list[str]]:
    """Which of some texts are longer than `limit` tokens, so that their ends are not read."""

    def cut(texts: Sequence[str]) -> list[str]:
        with quietly():  # tokenizers warn of the length in their own words
            return [text for text in texts if len(tokenizer(text).input_ids) > limit]

    return cut


def first_line(error: Exception) -> str:
    """What an error says, without what stands below."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _pooled(output: Any) -> Tensor:
    """A tensor in some versions of transformers, an output that holds it in others."""
    pooled: Tensor = getattr(output, "pooler_output", output)
    return pooled


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1).cpu()
