"""What a training step costs, beside one that works as the released code does -> benchmarks/results/train.json.

    python benchmarks/train.py                             # both models, both stages
    python benchmarks/train.py --model bundled --stage 1   # the other figures in --output stay as they are

Two arms compute the same losses of the same pictures, texts, noise and weights (held to 1e-4 before any is timed):
`ours`, and `naive` with six passes of the denoiser (`benchmarks/naive.py`). Both attend by SDPA, on one thread, and
take turns within a round; a ratio is the median over rounds of naive / ours. Seconds are the process's CPU time, which
on one thread is wall time less what other programs took. Peak memory is that of a process which does one step of one
arm.

Without caches latents are given to both arms and texts are encoded live; with them ours reads latents and texts from a
cache, and naive runs the VAE too. Drawing or reading the pictures is in no figure. No caption is dropped in stage 2.

`mid` is a Stable Diffusion with random weights at a fifth of the real widths: what it says does not matter, what it
costs does.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from naive import Naive
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.latents import encode_posterior
from dpt_t2i.backbones.loading import base_folder, load_backbone
from dpt_t2i.backbones.lora import add_lora
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import AdapterConfig, DenoiseConfig, ItmRecConfig, ProbeConfig, TuneConfig, build_config
from dpt_t2i.data.cache import pixels_key, text_key
from dpt_t2i.data.examples import Batch, Examples, collate
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.evaluation.provenance import versions, write_json
from dpt_t2i.training.cached import PARTS, CachedEncodings
from dpt_t2i.training.encode import Encoded, Encoder
from dpt_t2i.training.objective import Draw, ProbeObjective, TuneObjective, weigh, weights_of

TOLERANCE = 1e-4  # between the arms' losses: absolute, or relative where a loss is above 1
MODELS = ("mid", "bundled")
STAGES = (1, 2)
CONFIGS = {1: (ProbeConfig, "configs/bundled/probe.yaml"), 2: (TuneConfig, "configs/bundled/tune.yaml")}
MID_BATCH = 4
MID_SIZES = {
    "unet": "block_out_channels 64, 128, 256, 256; 2 layers a block, 8 heads; latents 4 x 32 x 32",
    "vae": "block_out_channels 32, 64, 128, 128; 2 layers a block; pictures of 256 x 256",
    "text_encoder": "12 layers of width 256, 77 tokens",
}


@dataclass(frozen=True)
class Workload:
    """One stage of one model, and the batch that every step sees."""

    backbone: Backbone
    adapter: DiscriminativeAdapter
    taps: tuple[Tap, ...]
    stage: int
    batch: Batch
    draw: Draw
    size: int  # pixels of a side

    def parameters(self) -> list[nn.Parameter]:
        modules = (self.adapter, self.backbone.denoiser)
        return [one for module in modules for one in module.parameters() if one.requires_grad]


class KeptLatents:
    """Stands where `Encoder` looks for a cache: latents are at hand, texts are not."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def latents_of(self, _images: Tensor, _encode: Any) -> Tensor:
        return self.latents

    def text_of(self, texts: Any, encode: Any) -> Any:
        return encode(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--stage", type=int, action="append", choices=STAGES)
    parser.add_argument("--rounds", type=int, default=5, help="paired steps of each arm")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/train.json"))
    parser.add_argument("--peak", nargs=3, metavar=("MODEL", "STAGE", "ARM"), help="used by the benchmark itself")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        model, stage, arm = args.peak
        sys.stdout.write(json.dumps(_peak_memory(model, int(stage), arm)))
        return
    result = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    result |= {"matmul_peak_gflops": _matmul_peak(), "threads": 1, "device": "cpu", "gpu": "not measured"}
    for model in args.model or MODELS:
        for stage in args.stage or STAGES:
            result.setdefault(model, {})[f"stage{stage}"] = _figures(model, stage, args.rounds, result)
            result |= _headline(result.get("mid", {}))
            result |= {"command": " ".join(["python", *sys.argv]), "versions": versions()}
            write_json(args.output, result)


def _headline(mid: dict[str, Any]) -> dict[str, Any]:
    ratios = {f"{stage}_{name}": figures[name] for stage, figures in mid.items() for name in ("ratio", "ratio_cached")}
    return ratios | {"mid_sizes": MID_SIZES}


def _figures(model: str, stage: int, rounds: int, result: dict[str, Any]) -> dict[str, Any]:
    """Everything about one stage of one model."""
    load = workload(model, stage)
    naive = Naive(load.backbone, load.adapter, load.taps, tunes=stage == 2)
    latents = naive.latents(load.batch)
    difference = _difference(load, naive, latents)
    flops = {
        "ours": _flops(load, lambda: _ours(load, _encoded(load, latents))),
        "naive": _flops(load, lambda: naive.losses(load.batch, latents, load.draw)),
    }
    with tempfile.TemporaryDirectory() as folder:
        cached = _filled_cache(load, Path(folder))
        seconds = [_round(load, naive, latents, cached) for _ in range(rounds)]
    arms = ("ours", "naive", "ours_checkpointing") if stage == 2 else ("ours", "naive")
    peaks = {arm: _in_own_process(model, stage, arm) for arm in arms}
    median = {name: statistics.median(row[name] for row in seconds) for name in seconds[0]}
    speed = {arm: flops[arm] / median[arm] / 1e9 for arm in flops}
    return {
        "batch": len(load.batch),
        "ratio": _ratio(seconds, ("naive",), ("ours",)),
        "ratio_cached": _ratio(seconds, ("naive", "vae"), ("ours_cached",)),
        "ratio_live_vae": _ratio(seconds, ("naive", "vae"), ("ours", "vae")),
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "images_per_s": {arm: round(len(load.batch) / median[arm], 3) for arm in ("ours", "naive", "ours_cached")},
        "gflop": {arm: round(value / 1e9, 2) for arm, value in flops.items()},
        "share_of_matmul_peak": {arm: round(speed[arm] / result["matmul_peak_gflops"], 3) for arm in flops},
        "peak_memory_gb": peaks,
        "largest_difference_of_losses": difference,
        "rounds": seconds,
    }


def _round(load: Workload, naive: Naive, latents: Any, cached: CachedEncodings) -> dict[str, float]:
    """CPU seconds of a step of each arm, and of what a cache saves.

    From the encoded batch on a step with caches is the step without, so it is timed once.
    """
    optimizer = torch.optim.AdamW(load.parameters(), lr=0.0)  # both arms go on from the same weights
    encoder = Encoder(load.backbone, load.adapter.config.num_token_classes, None, cached=cached)
    encoded, encoding = _timed(lambda: _encoded(load, latents))
    _, reading = _timed(lambda: encoder(load.batch))
    _, ours = _timed(lambda: _learn(load, optimizer, _ours(load, encoded)))
    _, theirs = _timed(lambda: _learn(load, optimizer, naive.losses(load.batch, latents, load.draw)))
    _, vae = _timed(lambda: naive.latents(load.batch))
    return {"ours": encoding + ours, "naive": theirs, "vae": vae, "ours_cached": reading + ours}


def _ratio(rounds: list[dict[str, float]], above: tuple[str, ...], below: tuple[str, ...]) -> float:
    ratios = [sum(row[name] for name in above) / sum(row[name] for name in below) for row in rounds]
    return round(statistics.median(ratios), 3)


def _ours(load: Workload, encoded: Encoded) -> dict[str, Tensor]:
    loss, boxes = ItmRecConfig(), float(encoded.targets.num_boxes())
    parts = (load.backbone, load.adapter, load.taps, loss)
    objective = ProbeObjective(*parts) if load.stage == 1 else TuneObjective(*parts, DenoiseConfig())
    return objective(encoded, load.draw, boxes)  # type: ignore[no-any-return]


def _encoded(load: Workload, latents: tuple[Tensor, ...]) -> Encoded:
    kept: Any = KeptLatents(torch.cat(latents))
    return Encoder(load.backbone, load.adapter.config.num_token_classes, None, cached=kept)(load.batch)


def _learn(load: Workload, optimizer: torch.optim.Optimizer, terms: dict[str, Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    weigh(terms, weights_of(ItmRecConfig(), DenoiseConfig())).total.backward()
    nn.utils.clip_grad_norm_(load.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def _difference(load: Workload, naive: Naive, latents: Any) -> float:
    """The largest between the arms' losses, dropout off."""
    load.adapter.eval()
    ours, theirs = _ours(load, _encoded(load, latents)), naive.losses(load.batch, latents, load.draw)
    load.adapter.train()
    assert ours.keys() == theirs.keys()
    each = [(ours[name] - theirs[name]).abs() / theirs[name].abs().clamp(min=1.0) for name in ours]
    difference = float(torch.stack(each).max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the arms compute different losses ({difference:.2g}); their times cannot be compared")
    return difference


def _flops(load: Workload, losses: Callable[[], dict[str, Tensor]]) -> float:
    """Of products and convolutions, forward and backward: the counter knows no others."""
    with FlopCounterMode(display=False) as counter:
        _learn(load, torch.optim.AdamW(load.parameters(), lr=0.0), losses())
    return float(counter.get_total_flops())


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def _matmul_peak(side: int = 1024, rounds: int = 10) -> float:
    """GFLOP/s of a float32 matrix product on this machine: the best of some."""
    first, second = torch.randn(side, side), torch.randn(side, side)
    return round(2 * side**3 / min(_timed(lambda: first @ second)[1] for _ in range(rounds)) / 1e9, 1)


def _in_own_process(model: str, stage: int, arm: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--peak", model, str(stage), arm]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def _peak_memory(model: str, stage: int, arm: str) -> dict[str, float]:
    """Of this process before and after its first step, which is all that it does; 1 GB = 10^9 bytes."""
    load = workload(model, stage)
    if arm == "ours_checkpointing":
        load.backbone.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        load.backbone.denoiser.train()  # as the engine does: in eval mode diffusers recomputes nothing
    latents = torch.randn(3, *load.draw.noise.shape).unbind()
    before = _resident_gb()
    if arm == "naive":
        terms = Naive(load.backbone, load.adapter, load.taps, tunes=stage == 2).losses(load.batch, latents, load.draw)
    else:
        terms = _ours(load, _encoded(load, latents))
    _learn(load, torch.optim.AdamW(load.parameters(), lr=0.0), terms)
    return {"before": before, "peak": _resident_gb()}


def _resident_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def _filled_cache(load: Workload, folder: Path) -> CachedEncodings:
    """The batch's latents and texts as `dpt data cache` stores them by default."""
    cached, batch = CachedEncodings(folder, load.backbone, load.size, "float16"), load.batch
    images = torch.cat([batch.images, batch.hard_images, batch.random_images])
    texts = ["", *{*batch.captions, *batch.hard_captions, *batch.random_captions, *batch.expressions}]
    with torch.no_grad():
        mean, log_variance = encode_posterior(load.backbone.pipeline.vae, images, load.backbone.vae_scale)
        states = load.backbone.encode_text(texts)
    distinct = {pixels_key(image): row for row, image in enumerate(images)}
    rows = list(distinct.values())
    cached.latents.write("batch", list(distinct), {"mean": mean[rows], "logvar": log_variance[rows]})
    cached.text.write("batch", [text_key(text) for text in texts], {name: getattr(states, name) for name in PARTS})
    return cached


def workload(model: str, stage: int) -> Workload:
    """The bundled model with its own settings, or the mid-size one with the default adapter and LoRA."""
    torch.manual_seed(0)
    kind, file = CONFIGS[stage]
    if model == "bundled":
        config = build_config(kind, Path(file))
        backbone, sizes, count = load_backbone("bundled", device="cpu"), config.adapter, config.train.train_batch_size
    else:
        config = build_config(kind)
        backbone, sizes, count = mid_size(), AdapterConfig(), MID_BATCH
    taps = backbone.parse_taps("up1")
    adapter = DiscriminativeAdapter(
        sizes, {tap.name: tap.channels for tap in taps}, backbone.pooled_dim, backbone.text_dim
    )
    if stage == 2:
        add_lora(backbone, config.lora.rank)
    side = backbone.image_size[0]
    examples = Examples(SceneRecords("train", 1000, side), side)
    latent_side = side // backbone.vae_scale
    draw = Draw(
        torch.randn(count, backbone.latent_channels, latent_side, latent_side),
        torch.randint(0, backbone.num_train_timesteps, (count,)),
        torch.zeros(count, dtype=torch.bool),
    )
    return Workload(backbone, adapter.train(), taps, stage, collate([examples[i] for i in range(count)]), draw, side)


def mid_size() -> StableDiffusionBackbone:
    """Random weights; the bundled model's tokenizer and noise schedule."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = base_folder("bundled")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    words = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(words),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=256, attention_head_dim=8
        ),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return StableDiffusionBackbone(pipeline, "mid")


if __name__ == "__main__":
    main()
