"""How long does mining compare all pairs? -> benchmarks/results/nearest.json

    python benchmarks/nearest.py

One chunk of 2,048 queries against `--chunks` chunks of 2,048 random unit vectors, by the function that `dpt data mine`
calls. The work is the same for each pair of chunks, so N records take (N / 2,048)^2 times the time of one: `minutes` at
the sizes of `AT`. Seconds are CPU time, which on one thread is wall time less what other programs took.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from dpt_t2i.data.mine import CHUNK, nearest
from dpt_t2i.evaluation.provenance import versions, write_json

AT = (30_000, 100_000, 118_287, 300_000, 1_000_000)  # the third is COCO's training images

log = logging.getLogger("nearest")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=6, help="chunks that one chunk of queries is compared with")
    parser.add_argument("--width", type=int, default=512, help="of an embedding")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/nearest.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, texts = F.normalize(torch.randn(2, args.chunks * CHUNK, args.width), dim=-1)
    start = time.process_time()
    next(nearest(images, texts, top_k=3, duplicate=0.95))
    seconds = (time.process_time() - start) / args.chunks
    result = {
        "cpu_s_a_pair_of_chunks": round(seconds, 4),
        "minutes": {str(count): round(seconds * (count / CHUNK) ** 2 / 60, 1) for count in AT},
        "command": f"python benchmarks/nearest.py --chunks {args.chunks} --width {args.width}",
        "threads": 1,
        "versions": versions(),
    }
    write_json(args.output, result)
    log.info("%s", result)


if __name__ == "__main__":
    main()
