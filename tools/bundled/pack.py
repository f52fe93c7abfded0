"""Last stage of the bundled model: put the parts together as package data.

    python tools/bundled/pack.py

`src/dpt_t2i/bundled/base` becomes a diffusers folder that plain `StableDiffusionPipeline.from_pretrained` loads, with
weights in fp16; `base/dpt/` takes adapter and LoRA of stages 1 and 2 where those runs exist, `image_encoder/` the other
half of the text encoder's training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from common import BASE, WORK, half_weights, log, start
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from dpt_t2i.config import GenerateConfig, PublishedSampling, build_config
from dpt_t2i.publish.privacy import public

TARGET = Path("src/dpt_t2i/bundled")
LIMIT_MB = 24.0
PROJECTION = "text_projection.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def main() -> None:
    start("pack")
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(BASE / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(BASE / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(BASE / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(BASE / "unet"),
        scheduler=DDIMScheduler.from_pretrained(BASE / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    learned = TARGET / "base" / "dpt"
    kept = WORK / "packed_dpt"
    if learned.exists():
        shutil.copytree(learned, kept, dirs_exist_ok=True)
    shutil.rmtree(TARGET / "base", ignore_errors=True)
    pipeline.save_pretrained(TARGET / "base")
    if kept.exists():
        shutil.copytree(kept, learned)
        shutil.rmtree(kept)
    _spell_out(TARGET / "base" / "tokenizer")
    shutil.copytree(WORK / "image_encoder", TARGET / "image_encoder", dirs_exist_ok=True)
    projection = torch.load(WORK / "text_projection.pt", weights_only=True)  # into the image encoder's space
    save_file({"text_projection.weight": projection["weight"]}, TARGET / "image_encoder" / PROJECTION)
    _take(WORK / "probe" / "adapter", learned / "probe" / "adapter")
    _take(WORK / "tune" / "adapter", learned / "tuned" / "adapter")
    _take(WORK / "tune" / LORA, learned / "tuned" / LORA)
    for part in ("vae", "text_encoder", "unet"):
        half_weights(TARGET / "base" / part)
    half_weights(TARGET / "image_encoder")
    for folder in (TARGET / "base" / "text_encoder", TARGET / "image_encoder"):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["dtype"] = "float32"  # transformers would else load what it finds: half precision
        file.write_text(json.dumps(config, indent=2) + "\n")
    _store_sampling(learned)
    size = sum(file.stat().st_size for file in TARGET.rglob("*.safetensors")) / 1e6
    log.info("pack: %.1f MB of weights in %s", size, TARGET)
    if size > LIMIT_MB:
        raise SystemExit(f"pack: {size:.1f} MB is over the limit of {LIMIT_MB} MB")


def _spell_out(tokenizer: Path) -> None:
    """`vocab.json` and `merges.txt` beside `tokenizer.json`: what older transformers and other tools read."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    added = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    vocab = model["vocab"] | {token["content"]: token["id"] for token in added}
    (tokenizer / "vocab.json").write_text(json.dumps(vocab))
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")


def _take(source: Path, target: Path) -> None:
    """Copy a run's artifact where it exists: the weights of an adapter in fp16, a LoRA without its maker's folders."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        with safe_open(source, "pt") as file:
            header = file.metadata()
        origin = json.dumps(public(json.loads(header["dpt"])), sort_keys=True)
        save_file(load_file(source), target, header | {"dpt": origin})
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    half_weights(target)


def _store_sampling(learned: Path) -> None:
    """What was chosen on dev: guidance and eta go to the base's `dpt/sampling.json`, and with each adapter travels the
    correction that it bears."""
    chosen = build_config(GenerateConfig, Path("configs/bundled/generate.yaml"))
    corrections = {"tuned": chosen, "probe": build_config(GenerateConfig, Path("configs/bundled/generate_base.yaml"))}
    learned.mkdir(exist_ok=True)
    sampling = chosen.sample.model_dump(mode="json", exclude_none=True, include=set(PublishedSampling.model_fields))
    (learned / "sampling.json").write_text(json.dumps(sampling, indent=2) + "\n")
    for stage, config in corrections.items():
        file = learned / stage / "adapter/config.json"
        if not file.is_file():
            continue
        card = json.loads(file.read_text())
        correction = config.correction.model_dump(mode="json")
        card["metadata"] = public(card["metadata"]) | {"correction": correction}  # no folder of the maker's machine
        file.write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
