"""Stage 0 of the bundled model: draw a pool of training examples once, for all stages to read.

    python tools/bundled/pool.py --chunks 0-19

A chunk holds 5,000 examples (10,000 pictures: each example's scene and that of its hard negative, with their captions).
A chunk that exists is left alone, so the command resumes.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.referring import refer
from dpt_t2i.scenes.render import render

CHUNK = 5000
SIZE = 64
POOL = Path("runs/bundled/pool")


@dataclass(frozen=True)
class Pool:
    """All drawn chunks, joined."""

    images: NDArray[np.uint8]  # [N, 2, 64, 64, 3]: [:, 0] the scene, [:, 1] the hard negative's
    captions: NDArray[np.str_]  # [N, 2] likewise
    expressions: NDArray[np.str_]  # [N, 2] a referring expression for something in each
    rules: NDArray[np.str_]  # [N] how the negative was made


def draw_chunk(chunk: int, folder: Path = POOL) -> None:
    """Draw examples [5000 chunk, 5000 (chunk + 1)) of the training split."""
    target = folder / f"{chunk:03d}.npz"
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    images = np.empty((CHUNK, 2, SIZE, SIZE, 3), dtype=np.uint8)
    captions, expressions, rules = [], [], []
    for row in range(CHUNK):
        example = make_example(chunk * CHUNK + row)
        images[row, 0] = np.asarray(render(example.scene, SIZE))
        images[row, 1] = np.asarray(render(example.negative.scene, SIZE))
        captions.append((example.caption.text, example.negative.caption.text))
        other = refer(example.negative.scene, np.random.default_rng([5, chunk, row]), most=1)
        nothing = example.negative.caption.text  # where there is nothing to refer to
        expressions.append((example.expressions[0].text, other[0].text if other else nothing))
        rules.append(example.negative.rule)
    partial = folder / f".{chunk:03d}.{os.getpid()}.npz"
    np.savez(
        partial,
        images=images,
        captions=np.array(captions),
        expressions=np.array(expressions),
        rules=np.array(rules),
    )
    partial.rename(target)


def read_pool(folder: Path = POOL, most: int | None = None) -> Pool:
    """Load the first `most` chunks, or all."""
    files = sorted(folder.glob("[0-9]*.npz"))[:most]
    if not files:
        raise SystemExit(f"no chunk in {folder}; run tools/bundled/pool.py first")
    parts = [np.load(file) for file in files]
    return Pool(
        images=np.concatenate([p["images"] for p in parts]),
        captions=np.concatenate([p["captions"] for p in parts]),
        expressions=np.concatenate([p["expressions"] for p in parts]),
        rules=np.concatenate([p["rules"] for p in parts]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", default="0-19", help="first-last")
    first, last = (int(part) for part in parser.parse_args().chunks.split("-"))
    for chunk in range(first, last + 1):
        draw_chunk(chunk)


if __name__ == "__main__":
    main()
