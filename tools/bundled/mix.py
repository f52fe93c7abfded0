"""A weighted sum of LoRAs of the bundled base, exactly: 1.25 of one, the mean of two.

    python tools/bundled/mix.py LORA 0.75 --out runs/bundled/weaker
    python tools/bundled/mix.py LORA 0.5 LORA 0.5 --out runs/bundled/mean

Each is a file or a run folder and its weight. Ranks add up: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import diffusers_reader, lora_file, place_lora, save_lora
from dpt_t2i.backbones.lora_files import LoraLayer, read_lora


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", help="LoRA and weight in turn")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new LoRA")
    parser.add_argument("--base", default="bundled")
    args = parser.parse_args(argv)
    if len(args.parts) % 2:
        parser.error("give each LoRA its weight")
    files = [lora_file(Path(name)) for name in args.parts[::2]]
    weights = [float(text) for text in args.parts[1::2]]
    backbone = load_backbone(args.base, None, "cpu", "float32")
    parts = {backbone.denoiser_key: backbone.denoiser}
    reader = diffusers_reader(backbone.pipeline, backbone.denoiser)
    layers = [read_lora(file, parts, args.base, reader).layers for file in files]
    place_lora(backbone, mixed(layers, weights), "the mix")
    save_lora(backbone, args.out, {"mixed": list(zip(args.parts[::2], weights, strict=True))})


def mixed(loras: Sequence[Mapping[str, LoraLayer]], weights: Sequence[float]) -> dict[str, Tensor]:
    """PEFT's tensors, of scale 1, of the sum over `weights`; a module that only some of the LoRAs change is kept."""
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for lora in loras for name in lora):
        found = [(lora[name], weight) for lora, weight in zip(loras, weights, strict=True) if name in lora]
        tensors[f"{name}.lora_A.weight"] = torch.cat([layer.down for layer, _ in found])
        scaled = [layer.up * (weight * layer.alpha / layer.rank) for layer, weight in found]
        tensors[f"{name}.lora_B.weight"] = torch.cat(scaled, dim=1)
    return tensors


if __name__ == "__main__":
    main()
