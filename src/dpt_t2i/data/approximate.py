"""Hard negatives among very many records: an index proposes candidates, which are compared as `mine` compares all.

The index (of faiss, an extra) sorts vectors into lists, each around a centroid, and looks only into those lists whose
centroids come nearest to a query. So it may overlook a record that comes near; what it proposes is judged exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpt_t2i.data.mine import CHUNK, Near, chunk_by_chunk, nearest_of, pairs
from dpt_t2i.errors import InputError

FAISS_FROM = 200_000  # records from which on `auto` takes the index
PROBES = 128  # lists that are looked into for a query
TRAINED_ON = 39, 64  # least and most vectors of a list that its centroid is trained on; faiss warns below 39
SEED = 0  # of the sample, and of where the centroids begin
PART = 256  # queries that are compared with their candidates at once: memory only

log = logging.getLogger(__name__)


def choose_search(wanted: Literal["auto", "exact", "faiss"], count: int) -> Literal["exact", "faiss"]:
    """How `count` records are searched; where `auto` would take the index and cannot, the log says so.

    Raises:
        InputError: faiss is asked for and is not installed.
    """
    if wanted == "exact" or (wanted == "auto" and count < FAISS_FROM):
        return "exact"
    try:
        _library()
    except InputError:
        if wanted == "faiss":
            raise
        log.warning(
            "all pairs of %d records are compared, which may take hours; an index takes less: "
            'pip install "dpt-t2i[faiss]"',
            count,
        )
        return "exact"
    return "faiss"


def nearest_by_index(
    images: Tensor,
    texts: Tensor,
    top_k: int,
    duplicate: float,
    chunk: int = CHUNK,
    root: Path | None = None,
    probes: int = PROBES,
) -> Iterator[Near]:
    """`mine.nearest`, from which it differs only where the index overlooks a record.

    A record that too few of its candidates are left to, the others being duplicates, is compared with all.

    Args:
        images, texts: unit vectors `[N, D]`, float32.
        probes: lists that the index looks into for a query; with as many as there are lists it overlooks only what
            rounding to a byte puts behind all candidates.

    Raises:
        InputError: faiss is not installed.
    """
    proposed = 4 * top_k + 32  # candidates of a query: room for itself and for duplicates

    @cache
    def indices() -> tuple[Any, Any]:  # not before a chunk is missing from what is kept
        return _index(texts, probes), _index(images, probes)

    def find(q: Tensor) -> list[Near]:
        sides = []
        for index, asked, offered in zip(indices(), (images, texts), (texts, images), strict=True):
            _, rows = index.search(asked[q].cpu().numpy(), proposed)
            sides.append(_best(q, torch.from_numpy(rows).to(q.device), asked, offered, top_k, duplicate))
        found = [Near(*both) for both in zip(*sides, strict=True)]
        short = [row for row, near in enumerate(found) if min(len(near.captions), len(near.images)) < top_k]
        if short:
            for row, near in zip(short, nearest_of(q[short], images, texts, top_k, duplicate, chunk), strict=True):
                found[row] = near
        return found

    yield from chunk_by_chunk(find, images, texts, (top_k, duplicate, "faiss sq8", proposed, probes, SEED), chunk, root)


def _index(vectors: Tensor, probes: int) -> Any:
    """An index by inner product over `[N, D]`, with about 4 sqrt(N) lists.

    A component takes a byte: reading the vectors is what a search takes its time for, and what it proposes is compared
    exactly.

    Centroids keep their lengths. Brought to length 1 they would be told apart by what all images, or all captions, have
    in common (the gap between the two: Liang et al., NeurIPS 2022), where a query is of the other kind.
    """
    faiss = _library()
    count, width = vectors.shape
    least, most = TRAINED_ON
    lists = max(1, min(round(4 * math.sqrt(count)), count // least))
    byte, product = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(width), width, lists, byte, product)
    index.nprobe = min(probes, lists)
    index.cp.spherical = False
    index.cp.seed, index.cp.max_points_per_centroid = SEED, most
    rows = vectors.cpu().contiguous().numpy()
    index.train(rows)
    index.add(rows)
    return index


def _best(
    q: Tensor, candidates: Tensor, asked: Tensor, offered: Tensor, top_k: int, duplicate: float
) -> list[tuple[tuple[int, float], ...]]:
    """Of each query's candidates the nearest, by the rules of `mine.nearest_of`.

    Args:
        q: rows `[Q]`.
        candidates: other rows `[Q, M]`; -1 stands for none.
        asked, offered: unit vectors `[N, D]`, of which queries and candidates are compared.
    """
    found: list[tuple[tuple[int, float], ...]] = []
    for rows, others in zip(q.split(PART), candidates.split(PART), strict=True):
        here, there = asked[rows, :, None], offered[rows, :, None]  # [P, D, 1]
        offers = offered[others]  # [P, M, D]
        same = ((asked[others] @ here > duplicate) | (offers @ there > duplicate))[..., 0]
        same |= (others == rows[:, None]) | (others < 0)
        cosines = (offers @ here)[..., 0].masked_fill(same, -torch.inf)
        values, places = cosines.topk(min(top_k, cosines.shape[1]))
        found += map(pairs, values, others.gather(1, places))
    return found


def _library() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise InputError('search faiss needs `faiss`: pip install "dpt-t2i[faiss]", or give search exact') from error
    return faiss
