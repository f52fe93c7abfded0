"""Hard negatives by an encoder: for each image the captions, and for each caption the images, that come nearest.

Of a record its first caption is taken. Nothing is of the order of N x N: similarities are taken chunk by chunk, and
only the best are kept. Embeddings go through the cache, so that a stopped run goes on, and several processes share it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from dpt_t2i.data.cache import Cache, Key, Spec, content_key, fill, record_key
from dpt_t2i.data.records import Record
from dpt_t2i.errors import InputError
from dpt_t2i.files import write_text

MINED = "mined.jsonl"
RULE = "mined"
BLOCK = 512  # records of one file of embeddings
CHUNK = 2048  # records of one side of a chunk of similarities


class Embedder(Protocol):
    """What `backbones.image_text` gives."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> Mapping[str, str]: ...
    @property
    def images(self) -> Callable[[Sequence[Image.Image]], Tensor]: ...
    @property
    def texts(self) -> Callable[[Sequence[str]], Tensor]: ...


@dataclass(frozen=True)
class Near:
    """The nearest of one record, best first: (row of another record, cosine)."""

    captions: tuple[tuple[int, float], ...]  # to its image
    images: tuple[tuple[int, float], ...]  # to its caption


def embed(
    records: Sequence[Record], encoder: Embedder, root: Path, batch_size: int, share: tuple[int, int] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """Unit vectors `[N, D]` of images and of first captions, float32; from `root` where they were made before.

    Args:
        share: number of this process, and of all, which fill one folder together.
    """
    weights = content_key(*(f"{part} {digest}".encode() for part, digest in sorted(encoder.fingerprint.items()))).hex()
    cache = Cache(root, Spec("embeddings", encoder.name, weights, 0, "float32", "float32"))
    nothing: dict[str, Any] = {"expressions": (), "negatives": (), "negative_image": None, "more_negative_images": ()}
    bare = [replace(record, **nothing) for record in records]
    parts = [bare[at : at + BLOCK] for at in range(0, len(bare), BLOCK)]
    names = [content_key(*map(record_key, part)).hex() for part in parts]

    def encode(number: int, beat: Callable[[], None]) -> tuple[list[Key], dict[str, Tensor], int]:
        images, texts = [], []
        for at in range(0, len(parts[number]), batch_size):
            batch = parts[number][at : at + batch_size]
            images.append(encoder.images([record.load_image() for record in batch]))
            texts.append(encoder.texts([record.captions[0] for record in batch]))
            beat()
        keys = [record_key(record) for record in parts[number]]
        return keys, {"image": torch.cat(images), "text": torch.cat(texts)}, 0

    fill(cache, names, encode, first=len(names) * share[0] // share[1])
    blocks = [cache.block(name) for name in names]
    return torch.cat([block["image"] for block in blocks]), torch.cat([block["text"] for block in blocks])


def nearest(
    images: Tensor, texts: Tensor, top_k: int, duplicate: float, chunk: int = CHUNK, root: Path | None = None
) -> Iterator[Near]:
    """For each of N records its hardest negatives, fewer than `top_k` where there are no more.

    Args:
        images, texts: unit vectors `[N, D]` of the records' images and captions, on the device that compares them.
        duplicate: cosine between two images, or two captions, above which they are taken for the same: such a record
            is no negative, since its caption may be true.
        root: folder that keeps what was found for each `chunk` of records, from which a stopped search goes on.
    """

    def find(q: Tensor) -> list[Near]:
        return nearest_of(q, images, texts, top_k, duplicate, chunk)

    yield from chunk_by_chunk(find, images, texts, (top_k, duplicate), chunk, root)


def chunk_by_chunk(
    find: Callable[[Tensor], list[Near]],
    images: Tensor,
    texts: Tensor,
    settings: tuple[Any, ...],
    chunk: int,
    root: Path | None,
) -> Iterator[Near]:
    """What `find` gives for the rows `[Q]` of each chunk of records; from `root` where it was found before.

    Args:
        settings: all that decides what is found, beside the vectors.
    """
    kept = None if root is None else root / "nearest" / _search_name(images, texts, settings)
    for q in torch.arange(len(images), device=images.device).split(chunk):
        file = None if kept is None else kept / f"{int(q[0])}-{len(q)}.json"
        if file is not None and file.is_file():
            yield from (Near(*(tuple(map(tuple, side)) for side in row)) for row in json.loads(file.read_text()))
            continue
        found = find(q)
        if file is not None:
            write_text(file, json.dumps([(near.captions, near.images) for near in found]))
        yield from found


def nearest_of(
    q: Tensor, images: Tensor, texts: Tensor, top_k: int, duplicate: float, chunk: int = CHUNK
) -> list[Near]:
    """`nearest` of the rows `q` `[Q]`, compared with all."""
    numbers = torch.arange(len(images), device=images.device)
    best = {side: (images.new_empty(len(q), 0), numbers.new_empty(len(q), 0)) for side in ("captions", "images")}
    for c in numbers.split(chunk):
        same = (images[q] @ images[c].T > duplicate) | (texts[q] @ texts[c].T > duplicate) | (q[:, None] == c)
        for side, (asked, offered) in {"captions": (images, texts), "images": (texts, images)}.items():
            found = (asked[q] @ offered[c].T).masked_fill(same, -torch.inf)
            values = torch.cat([best[side][0], found], dim=1)
            rows = torch.cat([best[side][1], c.expand(len(q), -1)], dim=1)
            values, places = values.topk(min(top_k, values.shape[1]), dim=1)
            best[side] = values, rows.gather(1, places)
    return [
        Near(*(pairs(*(part[row] for part in best[side])) for side in ("captions", "images"))) for row in range(len(q))
    ]


def pairs(values: Tensor, rows: Tensor) -> tuple[tuple[int, float], ...]:
    """One side of `Near`, of cosines `[K]` and the rows `[K]` that have them; -inf is left out."""
    found = zip(rows.tolist(), values.tolist(), strict=True)
    return tuple((row, round(value, 4)) for row, value in found if value > -torch.inf)


def _search_name(images: Tensor, texts: Tensor, settings: tuple[Any, ...]) -> str:
    vectors = (part.cpu().contiguous().numpy().tobytes() for part in (images, texts))
    return content_key(repr(settings).encode(), *vectors).hex()[:32]


def add_mined(rows: Sequence[Mapping[str, Any]], found: Sequence[Near]) -> list[dict[str, Any]]:
    """Rows of `metadata.jsonl` with mined negatives: captions behind what is there; where a row has no negative image,
    the nearest one, with its caption before all. What an earlier mining added is taken out first."""
    return [_with_mined(row, near, rows) for row, near in zip(rows, found, strict=True)]


def write_mined(
    folder: Path,
    encoder: Embedder,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[Near],
) -> None:
    """`mined.jsonl`: a header that says who mined, then a line a record."""
    lines = [{"encoder": encoder.name, "fingerprint": dict(encoder.fingerprint), **settings}]
    for row, near in zip(rows, found, strict=True):
        lines.append(
            {
                "file_name": row["file_name"],
                "captions": [
                    {"caption": rows[j]["captions"][0], "of": rows[j]["file_name"], "cosine": s}
                    for j, s in near.captions
                ],
                "images": [{"file_name": rows[j]["file_name"], "cosine": s} for j, s in near.images],
            }
        )
    write_text(folder / MINED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_miner(folder: Path) -> dict[str, Any] | None:
    """The header of a folder's `mined.jsonl`; None if its negatives were not mined.

    Raises:
        InputError: the header cannot be read.
    """
    file = Path(folder) / MINED
    if not file.is_file():
        return None
    with file.open(encoding="utf-8") as lines:
        try:
            header: dict[str, Any] = json.loads(next(lines, ""))
            return {"encoder": str(header["encoder"]), "fingerprint": dict(header["fingerprint"])}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} does not say who mined; mine again with `dpt data mine`, or remove it") from error


def _with_mined(row: Mapping[str, Any], near: Near, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    old, new = list(row.get("negatives") or ()), dict(row)
    if old and old[0]["rule"] == RULE:
        new.pop("negative_file", None)
    kept = [negative for negative in old if negative["rule"] != RULE]
    own = {text.casefold() for text in row["captions"]}

    def caption(other: int) -> str:
        return str(rows[other]["captions"][0])

    pictured = [other for other, _ in near.images if caption(other).casefold() not in own]
    lead = []
    if pictured and not new.get("negative_file"):
        new["negative_file"] = rows[pictured[0]]["file_name"]
        lead = [caption(pictured[0])]
    elif new.get("negative_file") and not kept:
        return new  # of its image only a caption that is true may come first, and none is known
    behind = dict.fromkeys(caption(other) for other, _ in near.captions)
    had = {*own, *lead, *(negative["caption"] for negative in kept)}
    mined = [{"caption": text, "rule": RULE} for text in behind if text.casefold() not in own and text not in had]
    new["negatives"] = [*({"caption": text, "rule": RULE} for text in lead), *kept, *mined]
    return new
