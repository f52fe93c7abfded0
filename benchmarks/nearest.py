"""How long does mining compare all pairs, or those that an index proposes? -> benchmarks/results/nearest.json

    python benchmarks/nearest.py

Exact: one chunk of 2,048 queries against `--chunks` chunks of 2,048 random unit vectors, by the function that
`dpt data mine` calls. The work is the same for each pair of chunks, so N records take (N / 2,048)^2 times the time of
one: `minutes` at the sizes of `AT`.

By an index, where faiss is installed: at each size of `--faiss` and with each number of `--probes` (lists looked into
for a query) the index is made and a few chunks of queries go through it; the time of all queries follows from these.
`recall_at_3` is the share of the exact three nearest captions and images of these queries that it finds. The vectors
are drawn: in clusters that overlap, of a spectrum that falls off, image and caption of a record alike (cosine about
0.27), and images and captions a gap apart. Those of an encoder may be easier or harder.

Seconds are CPU time, which on one thread is wall time less what other programs took.
"""

from __future__ import annotations

import argparse
import logging
import time
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dpt_t2i.data.approximate import PROBES, nearest_by_index
from dpt_t2i.data.mine import CHUNK, Near, nearest, nearest_of
from dpt_t2i.evaluation.provenance import versions, write_json

AT = (30_000, 100_000, 118_287, 300_000, 1_000_000)  # the third is COCO's training images
QUERIED = 2  # chunks of queries, after the one whose time has the making of the index in it
TOP_K, DUPLICATE = 3, 0.95

log = logging.getLogger("nearest")


def main() -> None:
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=6, help="chunks that one chunk of queries is compared with")
    parser.add_argument("--width", type=int, default=512, help="of an embedding")
    parser.add_argument(
        "--faiss", type=int, nargs="*", default=[30_000, 100_000, 200_000], help="records in an index, over 2,048"
    )
    parser.add_argument(
        "--probes", type=int, nargs="+", default=[32, 64, PROBES, 256], help="lists looked into for a query"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/nearest.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, texts = F.normalize(torch.randn(2, args.chunks * CHUNK, args.width), dim=-1)
    start = time.process_time()
    next(nearest(images, texts, TOP_K, DUPLICATE))
    seconds = (time.process_time() - start) / args.chunks
    sizes, probes = " ".join(map(str, args.faiss)), " ".join(map(str, args.probes))
    result = {
        "cpu_s_a_pair_of_chunks": round(seconds, 4),
        "minutes": {str(count): exact_minutes(seconds, count) for count in AT},
        "faiss": [],
        "command": f"python benchmarks/nearest.py --chunks {args.chunks} --width {args.width} "
        f"--faiss {sizes} --probes {probes}",
        "threads": 1,
        "versions": versions(),
    }
    if args.faiss and find_spec("faiss") is None:
        log.info("faiss is not installed; exact search only")
    elif args.faiss:
        result["faiss"], result["versions"]["faiss"] = by_index(args.faiss, args.width, args.probes, seconds)
    write_json(args.output, result)
    log.info("%s", result)


def exact_minutes(seconds: float, count: int) -> float:
    return round(seconds * (count / CHUNK) ** 2 / 60, 1)


def by_index(
    sizes: list[int], width: int, probes: list[int], seconds: float
) -> tuple[list[dict[str, float | int]], str]:
    """Time and recall at each size, beside the exact search's time; and the version of faiss."""
    import faiss

    faiss.omp_set_num_threads(1)
    rows = []
    for count in sizes:
        images, texts = drawn(count, width)
        queries = torch.arange(min(count, (1 + QUERIED) * CHUNK))
        exact = list(chain(*(nearest_of(q, images, texts, TOP_K, DUPLICATE) for q in queries.split(CHUNK))))
        for lists in probes:
            search = nearest_by_index(images, texts, TOP_K, DUPLICATE, probes=lists)
            start = time.process_time()
            found = list(islice(search, CHUNK))
            first = time.process_time() - start
            found += islice(search, len(queries) - CHUNK)
            each = (time.process_time() - start - first) / (len(found) - CHUNK)  # seconds of a query
            index = first - CHUNK * each
            rows.append(
                {
                    "records": count,
                    "probes": lists,
                    "index_minutes": round(index / 60, 2),
                    "search_minutes": round(count * each / 60, 2),
                    "minutes": round((index + count * each) / 60, 1),
                    "exact_minutes": exact_minutes(seconds, count),
                    "recall_at_3": round(recall(found, exact), 4),
                    "queries": len(queries),
                }
            )
            log.info("%s", rows[-1])
    return rows, faiss.__version__


def drawn(count: int, width: int) -> tuple[Tensor, Tensor]:
    """Unit vectors `[N, D]` of images and of captions, in clusters of about 20."""
    draw = torch.Generator().manual_seed(0)
    spectrum = F.normalize((1 + torch.arange(width)) ** -0.5, dim=0)

    def spread(rows: int) -> Tensor:
        return torch.randn(rows, width, generator=draw) * spectrum  # of about length 1

    records = spread(count // 20)[torch.randint(count // 20, (count,), generator=draw)] + spread(count)
    gap = F.normalize(torch.randn(width, generator=draw), dim=0)
    images, texts = (F.normalize(records + 0.7 * spread(count) + side * gap, dim=-1) for side in (1, -1))
    return images, texts


def recall(found: list[Near], exact: list[Near]) -> float:
    """Share of the exact search's captions and images that the other found for the same record."""
    sides = [
        (dict(getattr(one, side)).keys(), dict(getattr(other, side)).keys())
        for one, other in zip(found, exact, strict=True)
        for side in ("captions", "images")
    ]
    return sum(len(ours & theirs) for ours, theirs in sides) / sum(len(theirs) for _, theirs in sides)


if __name__ == "__main__":
    main()
