"""What an adapter at every tap costs over an adapter at one -> benchmarks/results/atlas.json.

    python benchmarks/atlas.py
    python benchmarks/atlas.py --rounds 9 --model bundled

A step is what the engine does with a batch whose latents and texts are given (a run with caches): one pass of the
denoiser, small adapters (`ATLAS_ADAPTER`) and losses, backward, clipping, AdamW. Arms: one adapter at `up1`, where the
pass ends early; one at the deepest tap, `up3`; one at each of the nine. They take turns; a ratio is the median over the
rounds' own ratios. Encoding of the batch (VAE and texts, the same in every arm) is measured beside it, for a run
without caches. One thread, CPU seconds of the process, which on one thread is wall time less what other programs took.

`all_taps_ratio` is nine taps over `up1` on the mid-size U-Net: widths (64, 128, 256, 256), 32x32 latents, batch 4,
random weights, everything else the bundled model's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.config import ATLAS_ADAPTER, ItmRecConfig, TrainConfig
from dpt_t2i.data.examples import Examples, collate
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.evaluation.provenance import versions, write_json
from dpt_t2i.objectives.types import Losses
from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.encode import Encoded, Encoder
from dpt_t2i.training.objective import AtlasObjective, weights_of
from dpt_t2i.training.optimizer import make_optimizer

ARMS = {"up1": "up1", "up3": "up3", "all": "all"}
BATCHES = {"mid_size": 4, "bundled": 16}
LOSS, TRAIN = ItmRecConfig(), TrainConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each arm that are counted; one more warms up")
    parser.add_argument("--model", action="append", choices=list(BATCHES), help="default: both")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/atlas.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = "".join(f" --model {name}" for name in args.model or ())
    result: dict[str, Any] = {
        "command": f"python benchmarks/atlas.py --rounds {args.rounds}{models}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    for name in args.model or BATCHES:
        result[name] = _figures(name, args.rounds)
        if name == "mid_size":
            result["all_taps_ratio"] = result[name]["ratio"]
        write_json(args.output, result)  # what is measured is kept


def _figures(name: str, rounds: int) -> dict[str, Any]:
    backbone = load_backbone("bundled", device="cpu")
    if name == "mid_size":
        backbone = _mid_size(backbone)
    examples = Examples(SceneRecords(length=64, size=backbone.image_size[0]), backbone.image_size[0])
    batch = collate([examples[index] for index in range(BATCHES[name])])
    encoder = Encoder(backbone, ATLAS_ADAPTER.num_token_classes, None)
    encode_seconds = [_seconds(lambda: encoder(batch)) for _ in range(4)][1:]
    encoded = encoder(batch)
    steps = {arm: _step(backbone, taps, encoded) for arm, taps in ARMS.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(rounds + 1):
        for arm, step in steps.items():
            seconds[arm].append(_seconds(step))
    counted = {arm: values[1:] for arm, values in seconds.items()}
    encoding = statistics.median(encode_seconds)
    return {
        "batch": len(batch.captions),
        "taps": len(backbone.parse_taps("all")),
        "ratio": _ratio(counted, "up1"),
        "ratio_to_deepest": _ratio(counted, "up3"),
        "ratio_with_encoding": _ratio(counted, "up1", encoding),
        "encoding_seconds": round(encoding, 4),
        "median_seconds": {arm: round(statistics.median(values), 4) for arm, values in counted.items()},
        "seconds": {arm: [round(value, 4) for value in values] for arm, values in counted.items()},
    }


def _ratio(seconds: dict[str, list[float]], arm: str, added: float = 0.0) -> float:
    pairs = zip(seconds["all"], seconds[arm], strict=True)
    return round(statistics.median((every + added) / (one + added) for every, one in pairs), 3)


def _mid_size(bundled: Backbone) -> Backbone:
    pipeline = bundled.pipeline
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel(**config | {"block_out_channels": (64, 128, 256, 256), "sample_size": 32})
    return StableDiffusionBackbone(pipeline, "mid-size")


def _step(backbone: Backbone, taps: str, encoded: Encoded) -> Callable[[], None]:
    """One optimiser step on fresh adapters of `taps`."""
    found = backbone.parse_taps(taps)
    torch.manual_seed(0)
    adapters = {
        tap.name: DiscriminativeAdapter(ATLAS_ADAPTER, {tap.name: tap.channels}, backbone.pooled_dim, backbone.text_dim)
        for tap in found
    }
    objective = AtlasObjective(backbone, adapters, found, LOSS).train()
    optimizer, weights = make_optimizer(objective.parameters(), TRAIN), weights_of(LOSS)
    generator = torch.Generator().manual_seed(0)
    count = len(encoded)
    draw = Draw(
        torch.randn(encoded.latents[:count].shape, generator=generator),
        torch.randint(backbone.num_train_timesteps, (count,), generator=generator),
        torch.zeros(count, dtype=torch.bool),
    )
    boxes = float(encoded.targets.num_boxes())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        Losses(objective(encoded, draw, boxes), weights).total.backward()
        for adapter in adapters.values():
            nn.utils.clip_grad_norm_(adapter.parameters(), TRAIN.max_grad_norm)
        optimizer.step()

    return step


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
