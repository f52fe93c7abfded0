"""What a training step costs, beside one that works as the released code does -> benchmarks/results/train.json.

    python benchmarks/train.py                             # both models, both stages
    python benchmarks/train.py --model bundled --stage 1   # the other figures in --output stay as they are
    python benchmarks/train.py --model mid_sd_vae --part seconds   # `mid` behind a VAE as wide as Stable Diffusion's

Two arms compute the same losses of the same latents, texts, noise and weights (held to 1e-4 before any is timed):
`ours`, and `naive` with six passes of the denoiser and the libraries' layers (`benchmarks/naive.py`). Both denoisers
attend by SDPA, on one thread, and the arms take turns within a round; a ratio is the median over rounds of naive /
ours. Seconds are the process's CPU time, which on one thread is wall time less what other programs took. The first
round also counts FLOPs, which slows both a little. `--part memory` does one step of one arm a process, for its peak.

Without caches latents are given to both arms and texts are encoded live; with them ours reads latents and texts from a
cache, and naive runs the VAE too (timed on a third of the pictures). Latents and weights of `mid` are random: what they
say does not matter, what they cost does. Drawing or reading the pictures is in no figure. No caption is dropped in
stage 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from data import SD_VAE
from naive import Naive
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.loading import base_folder, load_backbone
from dpt_t2i.backbones.lora import add_lora
from dpt_t2i.backbones.stable_diffusion import StableDiffusionBackbone
from dpt_t2i.backbones.types import Tap
from dpt_t2i.config import AdapterConfig, DenoiseConfig, ItmRecConfig, ProbeConfig, TuneConfig, build_config
from dpt_t2i.data.cache import pixels_key, text_key
from dpt_t2i.data.examples import Batch, Examples, collate
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.evaluation.provenance import versions, write_json
from dpt_t2i.objectives.types import Losses
from dpt_t2i.training.cached import CachedEncodings
from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.encode import Encoded, Encoder
from dpt_t2i.training.objective import ProbeObjective, TuneObjective, weights_of

TOLERANCE = 1e-4  # between the arms' losses: absolute, or relative where a loss is above 1
MODELS = ("mid", "bundled")  # unless one is named
WITH_SD_VAE = "mid_sd_vae"
STAGES = (1, 2)
PARTS = ("seconds", "memory")
ARMS = ("ours", "naive", "ours_checkpointing")
TIMED = ("ours", "naive", "vae", "ours_cached")
CONFIGS = {1: (ProbeConfig, "configs/bundled/probe.yaml"), 2: (TuneConfig, "configs/bundled/tune.yaml")}
MID_BATCH = 4
MID_VAE = {**SD_VAE, "block_out_channels": (32, 64, 128, 128), "sample_size": 256}
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
    latents: Tensor  # [3 B, C, h, w], as of an `Encoded`
    draw: Draw
    side: int  # pixels of a picture's

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
    parser.add_argument("--model", action="append", choices=(*MODELS, WITH_SD_VAE))
    parser.add_argument("--stage", type=int, action="append", choices=STAGES)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5, help="paired steps of each arm")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/train.json"))
    parser.add_argument("--peak-of", choices=ARMS, help="used by the benchmark itself")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _count_attention()
    if args.peak_of:
        sys.stdout.write(json.dumps(_peak_memory(args.model[0], args.stage[0], args.peak_of)))
        return
    result = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    result |= {"threads": 1, "device": "cpu", "gpu": "not measured", "mid_sizes": MID_SIZES}
    for part in args.part or PARTS:
        for model in args.model or MODELS:
            for stage in args.stage or STAGES:
                ran = {f"{part}_command": " ".join(["python", *sys.argv])}
                measured = _seconds(model, stage, args.rounds) if part == "seconds" else [_memory(model, stage)]
                for figures in measured:  # kept round by round: an interrupted run loses one
                    result.setdefault(model, {}).setdefault(f"stage{stage}", {}).update(figures | ran)
                    result |= _headline(result.get("mid", {})) | _all_taps(args.output) | {"versions": versions()}
                    result["command"] = "python benchmarks/train.py"  # a part says how it was measured
                    write_json(args.output, result)


def _headline(mid: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{stage}_{name}": figures[name]
        for stage, figures in mid.items()
        for name in ("ratio", "ratio_cached")
        if name in figures
    }


def _all_taps(output: Path) -> dict[str, Any]:
    """The figure of `benchmarks/atlas.py`, where that lies beside."""
    file = output.with_name("atlas.json")
    return {"all_taps_ratio": json.loads(file.read_text(encoding="utf-8"))["all_taps_ratio"]} if file.is_file() else {}


def _seconds(model: str, stage: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Everything about one stage of one model but its memory, after each round."""
    load = workload(model, stage)
    naive = Naive(load.backbone, load.adapter, load.taps, tunes=stage == 2)
    fixed = {"batch": len(load.batch), "largest_difference_of_losses": _difference(load, naive)}
    peak, seconds = _matmul_peak(), list[dict[str, float]]()
    with tempfile.TemporaryDirectory() as folder:
        cached = _filled_cache(load, Path(folder))
        with FlopCounterMode(display=False) as counter:  # warms up too: counting takes time
            flops = _round(load, naive, cached, counter)
        for _ in range(rounds):
            seconds.append(_round(load, naive, cached))
            yield fixed | _summary(seconds, flops, len(load.batch), peak) | {"rounds": seconds}


def _summary(seconds: list[dict[str, float]], flops: dict[str, float], batch: int, peak: float) -> dict[str, Any]:
    median = {name: statistics.median(row[name] for row in seconds) for name in TIMED}
    gflop = {arm: flops[f"{arm}_flops"] / 1e9 for arm in ("ours", "naive")}
    return {
        "ratio": _ratio(seconds, ("naive",), ("ours",)),
        "ratio_cached": _ratio(seconds, ("naive", "vae"), ("ours_cached",)),
        "ratio_live_vae": _ratio(seconds, ("naive", "vae"), ("ours", "vae")),
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "images_per_s": {arm: round(batch / median[arm], 3) for arm in ("ours", "naive", "ours_cached")},
        "gflop": {arm: round(value, 2) for arm, value in gflop.items()},
        "matmul_peak_gflops": peak,
        "share_of_matmul_peak": {arm: round(gflop[arm] / median[arm] / peak, 3) for arm in gflop},
    }


def _round(
    load: Workload, naive: Naive, cached: CachedEncodings, counter: FlopCounterMode | None = None
) -> dict[str, float]:
    """CPU seconds of a step of each arm, and of what a cache saves; FLOPs where they are counted.

    From the encoded batch on a step with caches is the step without, so it is timed once.
    """
    optimizer = torch.optim.AdamW(load.parameters(), lr=0.0)  # both arms go on from the same weights
    encoder = Encoder(load.backbone, load.adapter.config.num_token_classes, None, cached=cached)
    flops = [0]  # until now, after ours, after both
    encoded, encoding = _timed(lambda: _encoded(load))
    _, learning = _timed(lambda: _learn(load, optimizer, _ours(load, encoded)))
    flops.append(counter.get_total_flops() if counter else 0)
    _, theirs = _timed(lambda: _learn(load, optimizer, naive.losses(load.batch, load.latents, load.draw)))
    flops.append(counter.get_total_flops() if counter else 0)
    _, reading = _timed(lambda: encoder(load.batch))
    with torch.no_grad():
        _, third = _timed(lambda: load.backbone.encode_image(load.batch.images))
    timed = {"ours": encoding + learning, "naive": theirs, "vae": 3 * third, "ours_cached": reading + learning}
    return timed | ({"ours_flops": flops[1], "naive_flops": flops[2] - flops[1]} if counter else {})


def _ratio(rounds: list[dict[str, float]], above: tuple[str, ...], below: tuple[str, ...]) -> float:
    ratios = [sum(row[name] for name in above) / sum(row[name] for name in below) for row in rounds]
    return round(statistics.median(ratios), 3)


def _ours(load: Workload, encoded: Encoded) -> dict[str, Tensor]:
    loss, boxes = ItmRecConfig(), float(encoded.targets.num_boxes())
    parts = (load.backbone, load.adapter, load.taps, loss)
    objective = ProbeObjective(*parts) if load.stage == 1 else TuneObjective(*parts, DenoiseConfig())
    return objective(encoded, load.draw, boxes)  # type: ignore[no-any-return]


def _encoded(load: Workload) -> Encoded:
    kept: Any = KeptLatents(load.latents)
    return Encoder(load.backbone, load.adapter.config.num_token_classes, None, cached=kept)(load.batch)


def _learn(load: Workload, optimizer: torch.optim.Optimizer, terms: dict[str, Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    Losses(terms, weights_of(ItmRecConfig(), DenoiseConfig())).total.backward()
    nn.utils.clip_grad_norm_(load.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def _difference(load: Workload, naive: Naive) -> float:
    """The largest between the arms' losses, dropout off."""
    load.adapter.eval()
    ours, theirs = _ours(load, _encoded(load)), naive.losses(load.batch, load.latents, load.draw)
    load.adapter.train()
    assert ours.keys() == theirs.keys()
    each = [(ours[name] - theirs[name]).abs() / theirs[name].abs().clamp(min=1.0) for name in ours]
    difference = float(torch.stack(each).max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the arms compute different losses ({difference:.2g}); their times cannot be compared")
    return difference


def _count_attention() -> None:
    """PyTorch's counter takes the CPU's attention and sums in place for free; it is told what they cost."""
    aten: Any = torch.ops.aten

    @register_flop_formula(aten.addmm_)  # type: ignore[untyped-decorator]
    def in_place(_sum: Any, first: Any, second: Any, **_named: Any) -> int:
        return 2 * int(first[0] * first[1] * second[1])

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)  # type: ignore[untyped-decorator]
    def forward(query: Any, key: Any, value: Any, *_args: Any, **_named: Any) -> int:
        return sdpa_flop_count(query, key, value)

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)  # type: ignore[untyped-decorator]
    def backward(gradient: Any, query: Any, key: Any, value: Any, *_args: Any, **_named: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def _matmul_peak(side: int = 1024, rounds: int = 10) -> float:
    """GFLOP/s of a float32 matrix product on this machine: the best of some."""
    first, second = torch.randn(side, side), torch.randn(side, side)
    return round(2 * side**3 / min(_timed(lambda: first @ second)[1] for _ in range(rounds)) / 1e9, 1)


def _memory(model: str, stage: int) -> dict[str, Any]:
    """Resident gigabytes of each arm before its step and at its peak."""
    command = [sys.executable, __file__, "--model", model, "--stage", str(stage), "--peak-of"]
    arms = ARMS if stage == 2 else ARMS[:2]  # stage 1 sends no gradient through the denoiser
    outputs = {arm: subprocess.run([*command, arm], check=True, capture_output=True, text=True).stdout for arm in arms}
    return {"memory_gb": {arm: json.loads(output) for arm, output in outputs.items()}}


def _peak_memory(model: str, stage: int, arm: str) -> dict[str, float]:
    """Of this process before and after its first step, which is all that it does."""
    load = workload(model, stage)
    if arm == "ours_checkpointing":
        load.backbone.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    before = _resident_gb()
    if arm == "naive":
        terms = Naive(load.backbone, load.adapter, load.taps, stage == 2).losses(load.batch, load.latents, load.draw)
    else:
        terms = _ours(load, _encoded(load))
    _learn(load, torch.optim.AdamW(load.parameters(), lr=0.0), terms)
    return {"before": before, "peak": _resident_gb()}


def _resident_gb() -> float:
    """The most that this process has held. Not by `getrusage`, to which a process brings its parent's along (Linux)."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(peak.split()[1]) * 1024 / 1e9, 3)


def _filled_cache(load: Workload, folder: Path) -> CachedEncodings:
    """Rows for the batch's pictures and texts, as `dpt data cache` stores them by default."""
    cached, batch = CachedEncodings(folder, load.backbone, load.side, "float16"), load.batch
    images = [pixels_key(image) for image in torch.cat([batch.images, batch.hard_images, batch.random_images])]
    keys = list(dict.fromkeys(images))
    mean = load.latents[[images.index(key) for key in keys]]
    cached.latents.write("batch", keys, {"mean": mean, "logvar": torch.zeros_like(mean)})
    texts = list({"", *batch.captions, *batch.hard_captions, *batch.random_captions, *batch.expressions})
    states = load.backbone.encode_text(texts)
    columns = {name: getattr(states, name) for name in ("tokens", "pooled", "mask")}
    cached.text.write("batch", [text_key(text) for text in texts], columns)
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
        vae = SD_VAE if model == WITH_SD_VAE else MID_VAE
        backbone, sizes, count = mid_size(vae), AdapterConfig(), MID_BATCH
    taps = backbone.parse_taps("up1")
    adapter = DiscriminativeAdapter(
        sizes, {tap.name: tap.channels for tap in taps}, backbone.pooled_dim, backbone.text_dim
    )
    if stage == 2:
        add_lora(backbone, config.lora.rank)
    side = backbone.image_size[0]
    examples = Examples(SceneRecords("train", 1000, side), side)
    shape = (backbone.latent_channels, side // backbone.vae_scale, side // backbone.vae_scale)
    timesteps = torch.randint(0, backbone.num_train_timesteps, (count,))
    return Workload(
        backbone=backbone,
        adapter=adapter.train(),
        taps=taps,
        stage=stage,
        batch=collate([examples[i] for i in range(count)]),
        latents=torch.randn(3 * count, *shape),
        draw=Draw(torch.randn(count, *shape), timesteps, torch.zeros(count, dtype=torch.bool)),
        side=side,
    )


def mid_size(vae: dict[str, Any]) -> StableDiffusionBackbone:
    """Random weights; the bundled model's tokenizer and noise schedule; a VAE of that configuration."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = base_folder("bundled")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=77)
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
        vae=AutoencoderKL(**vae),
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
