"""What data cost at 100,000 records -> benchmarks/results/data.json

    python benchmarks/data.py

An imagefolder of `--n` records is made in a temporary folder and removed afterwards: `--bodies` different JPEG files of
640 x 480 pixels (a drawn scene under noise, so that a file is as large as a photograph's), to which the records' own
files are hard links, with captions, expressions and negatives of drawn scenes. Measured on one thread:

- `index`: reading it all into the index; bytes a record, and how much the process's peak memory grew.
- `loader`: examples (two pictures each: decoded, cropped to `--size`, as tensors) with 1 and 2 loader workers.
- `cache`: blocks of latents written (to the disk) and rows read at random.
- `warm`: an epoch's pictures decoded and encoded by the VAE, beside decoded and found in the cache; with the bundled
  VAE at 64 pixels, and with a VAE of Stable Diffusion's configuration (random weights) at 256.

Seconds are CPU time, workers' included, which on one thread is wall time less what other programs took; wall time,
which other programs lengthen, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch import Tensor

from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.latents import draw_latents, encode_posterior
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.config import DataConfig
from dpt_t2i.data.cache import Cache, Spec, pixels_key
from dpt_t2i.data.examples import Examples, Part
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.index import RecordIndex
from dpt_t2i.data.records import Record
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.data.sources import read_source
from dpt_t2i.evaluation.provenance import versions, write_json

WIDTH, HEIGHT = 640, 480  # pixels of a picture, as most of COCO's
BATCH = 16
SD_VAE = {  # the configuration of Stable Diffusion 1.x's VAE
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}

log = logging.getLogger("data")


class Clock:
    """CPU seconds of this process and of its workers that have ended, and wall seconds."""

    def __init__(self) -> None:
        self.cpu, self.wall = 0.0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        cpu, wall = _cpu_seconds(), time.perf_counter()
        yield
        self.cpu, self.wall = self.cpu + _cpu_seconds() - cpu, self.wall + time.perf_counter() - wall

    def rates(self, name: str, amount: float) -> dict[str, float]:
        """Amount a second, of either kind."""
        return {f"{name}_per_cpu_s": round(amount / self.cpu, 1), f"{name}_per_wall_s": round(amount / self.wall, 1)}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000, help="records")
    parser.add_argument("--bodies", type=int, default=200, help="different JPEG files")
    parser.add_argument("--size", type=int, default=256, help="pixels of the square that the loader makes")
    parser.add_argument("--batches", type=int, default=20, help="batches of 16 examples a loader is timed for")
    parser.add_argument("--blocks", type=int, default=64, help="cache files of 128 rows")
    parser.add_argument("--pictures", type=int, default=4, help="pictures that the SD-wide VAE encodes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/data.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"records": args.n, "different_pictures": args.bodies, "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result["jpeg_bytes"] = make_folder(folder / "images", args.n, args.bodies)
        records, result["index"] = time_index(folder / "images")
        log.info("%s", result)
        examples = Examples(records, args.size)
        result["loader"] = {f"workers_{n}": time_loader(examples, n, args.batches) for n in (1, 2)}
        log.info("%s", result["loader"])
        result["cache"] = time_cache(folder / "cache", args.blocks)
        log.info("%s", result["cache"])
        backbone = load_backbone("bundled", None, "cpu", "float32")
        result["warm"] = {"bundled_64": time_warm(backbone, Examples(records, 64), 64, folder / "bundled")}
        log.info("%s", result["warm"])
        backbone.pipeline.vae = AutoencoderKL(**SD_VAE).eval()
        backbone.pipeline.vae_scale_factor = 8
        result["warm"]["sd_width_256"] = time_warm(backbone, Examples(records, 256), args.pictures, folder / "sd")
    command = " ".join(f"--{name} {getattr(args, name)}" for name in ("n", "bodies", "size", "batches", "blocks"))
    result |= {
        "command": f"python benchmarks/data.py {command} --pictures {args.pictures}",
        "threads": 1,
        "versions": versions(),
    }
    write_json(args.output, result)
    log.info("%s", json.dumps(result, indent=2))


def make_folder(folder: Path, count: int, bodies: int) -> int:
    """An imagefolder of hard links; returns the mean size of a JPEG file in bytes."""
    folder.mkdir(parents=True)
    scenes = SceneRecords("train", bodies, HEIGHT)
    rows = [_row(scene) for scene in scenes]
    for number, scene in enumerate(scenes):
        _picture(scene.load_image(), number).save(folder / f"body-{number}.jpg", quality=90)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            name = f"{number:012d}.jpg"
            os.link(folder / f"body-{number % bodies}.jpg", folder / name)
            file.write(json.dumps({"file_name": name} | rows[number % bodies]) + "\n")
    return sum((folder / f"body-{number}.jpg").stat().st_size for number in range(bodies)) // bodies


def _picture(scene: Image.Image, seed: int) -> Image.Image:
    """The scene at the left of a wider picture, under blurred noise."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128))
    canvas.paste(scene, (0, 0))
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.blend(canvas, Image.fromarray(noise).filter(ImageFilter.GaussianBlur(0.8)), 0.5)


def _row(record: Record) -> dict[str, Any]:
    return {
        "captions": list(record.captions),
        "expressions": [{"text": e.text, "spans": e.spans, "boxes": e.boxes} for e in record.expressions],
        "negatives": [{"caption": n.caption, "rule": n.rule} for n in record.negatives],
    }


def time_index(folder: Path) -> tuple[RecordIndex, dict[str, float]]:
    before, clock = _peak_mb(), Clock()
    with clock.running():
        records = RecordIndex(read_source(DataConfig(dataset=str(folder)), "train", Faults()))
    figures = clock.rates("records", len(records)) | {"bytes_a_record": round(records.nbytes / len(records), 1)}
    return records, figures | {"cpu_s": round(clock.cpu, 1), "peak_memory_grew_mb": round(_peak_mb() - before, 1)}


def time_loader(examples: Examples, workers: int, batches: int) -> dict[str, float]:
    clock = Clock()
    with clock.running():
        seen = sum(len(batch) for batch in examples.loader(Part(BATCH, steps=batches), workers))
    return clock.rates("examples", seen) | {"cpu_ms_an_example": round(1000 * clock.cpu / seen, 2)}


def time_cache(root: Path, blocks: int) -> dict[str, float]:
    """Rows of the size of Stable Diffusion's latents at 256 pixels: two moments of 4 x 32 x 32 halves."""
    cache = Cache(root, Spec("latents", "timed", "0", 256, "float32", "float16"))
    block = {name: torch.randn(128, 4, 32, 32) for name in ("mean", "logvar")}
    keys = [number.to_bytes(16, "little") for number in range(128 * blocks)]
    megabytes = len(keys) * 2 * 4 * 32 * 32 * 2 / 1e6
    writing, reading = Clock(), Clock()
    with writing.running():
        for number in range(blocks):
            cache.write(f"{number:032x}", keys[128 * number : 128 * (number + 1)], block)
    order = np.random.default_rng(0).permutation(len(keys))
    with reading.running():
        for at in range(0, len(order), 2 * BATCH):
            cache.read([keys[i] for i in order[at : at + 2 * BATCH]])
    figures = writing.rates("write_mb", megabytes) | reading.rates("read_mb", megabytes)
    return figures | {"megabytes": round(megabytes, 1)}


@torch.no_grad()
def time_warm(backbone: Backbone, examples: Examples, pictures: int, root: Path) -> dict[str, float]:
    """Milliseconds a picture; the warm epoch runs several times over few pictures."""
    vae, size = backbone.pipeline.vae, examples.resolution
    cache = Cache(root, Spec("latents", "timed", "0", size, "float32", "float16"))
    cold, warm, decoding = Clock(), Clock(), Clock()
    per_example = 2  # its own picture and the random negative's
    rows = range(pictures // per_example)
    with cold.running():
        shown = [_pixels(examples, row) for row in rows]
        parts = [encode_posterior(vae, pixels, backbone.vae_scale) for pixels in shown]
    mean, log_variance = (torch.cat(part) for part in zip(*parts, strict=True))
    keys = [pixels_key(pixels) for pixels in torch.cat(shown)]
    cache.write("0" * 32, keys, {"mean": mean, "logvar": log_variance})
    turns = max(1, 64 // pictures)
    with decoding.running():
        for _ in range(turns):
            for row in rows:
                _pixels(examples, row)
    with warm.running():
        for _ in range(turns):
            for row in rows:
                found = cache.read([pixels_key(pixels) for pixels in _pixels(examples, row)])
                draw_latents(vae, found["mean"].float(), found["logvar"].float())
    count = per_example * len(rows)
    cold_ms, warm_ms, decode_ms = (
        1000 * clock.cpu / count / repeats for clock, repeats in ((cold, 1), (warm, turns), (decoding, turns))
    )
    figures = {"cold_ms": cold_ms, "warm_ms": warm_ms, "decode_ms": decode_ms, "cold_over_warm": cold_ms / warm_ms}
    return {name: round(value, 3) for name, value in figures.items()} | {"pictures": count}


def _pixels(examples: Examples, row: int) -> Tensor:
    item = examples.item(0, row)
    return torch.stack([item.pixels, item.random_pixels])


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
