"""`dpt data cache`: the VAE's posteriors and the text states of a data set, encoded once, and found again in training.

The noise of a posterior stays alive: both its moments are kept, before the denoiser's scaling.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpt_t2i.backbones.fingerprint import part_hashes
from dpt_t2i.backbones.interface import Backbone
from dpt_t2i.backbones.latents import draw_latents
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.config import CacheConfig, TrainDataConfig
from dpt_t2i.data.cache import Cache, Columns, Key, Spec, content_key, fill, pixels_key, record_key, text_key
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.perturb import perturb
from dpt_t2i.data.records import ImageSource, Record, load_picture
from dpt_t2i.data.sources import open_records
from dpt_t2i.data.transforms import fit_square, mirror, to_pixels
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.shares import gathered, processes

TEXT_BATCH = 32  # texts in one pass
PARTS = ("tokens", "pooled", "mask")

Boxes = tuple[tuple[float, float, float, float], ...]

log = logging.getLogger(__name__)


class CachedEncodings:
    """Latents and text states of one base at one size; what is missing is encoded as it comes, and said once."""

    def __init__(self, root: Path, backbone: Backbone, size: int, dtype: str) -> None:
        self.backbone = backbone
        hashes = part_hashes(backbone.pipeline)
        vae = {name: digest for name, digest in hashes.items() if name.startswith("vae")}
        texts = {name: digest for name, digest in hashes.items() if name not in vae} | _vocabularies(backbone.pipeline)
        limit = backbone.null_text(1).tokens.shape[1]

        def spec(kind: str, weights: dict[str, str], extent: int) -> Spec:
            compute = str(backbone.dtype).removeprefix("torch.")
            return Spec(kind, backbone.name, _joined(weights), extent, compute, dtype)

        self.latents = Cache(root, spec("latents", vae, size))
        self.text = Cache(root, spec("text", texts, limit))
        self._told = False

    def latents_of(self, images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """`[B, 3, S, S]` in [-1, 1] -> latents `[B, C, h, w]` float32, the posterior's mean, as `encode` gives them."""
        keys = [pixels_key(image) for image in images]
        known = [row for row, key in enumerate(keys) if key in self.latents]
        missing = [row for row, key in enumerate(keys) if key not in self.latents]
        self._tell("images", missing, keys)
        parts = [encode(images[missing])] if missing else []
        if known:
            rows = self.latents.read([keys[row] for row in known])
            mean, log_variance = (rows[name].float().to(self.backbone.device) for name in ("mean", "logvar"))
            parts.append(draw_latents(self.backbone.pipeline.vae, mean, log_variance))
        return torch.cat(parts)[_inverse([*missing, *known])]

    def text_of(self, texts: Sequence[str], encode: Callable[[Sequence[str]], TextStates]) -> TextStates:
        """States of `texts`, as `encode` gives them."""
        keys = [text_key(text) for text in texts]
        known = [row for row, key in enumerate(keys) if key in self.text]
        missing = [row for row, key in enumerate(keys) if key not in self.text]
        self._tell("texts", missing, keys)
        parts = [encode([texts[row] for row in missing])] if missing else []
        if known:
            rows = self.text.read([keys[row] for row in known])
            rows = {name: part.float() if part.is_floating_point() else part for name, part in rows.items()}
            extras = {name: rows.pop(name) for name in list(rows) if name not in PARTS}
            parts.append(TextStates(**rows, extras=extras).to(self.backbone.device))
        return TextStates.cat(parts).select(_inverse([*missing, *known]).to(self.backbone.device))

    def _tell(self, what: str, missing: Sequence[int], keys: Sequence[Key]) -> None:
        if missing and not self._told:
            self._told = True
            log.warning(
                "%d of %d %s are not in the cache %s and are encoded as they come, as later ones will be; "
                "`dpt data cache` with the settings of this run fills it",
                len(missing), len(keys), what, self.latents.folder.parent,
            )  # fmt: skip


def open_cache(config: TrainDataConfig, backbone: Backbone, size: int) -> CachedEncodings | None:
    """None where the settings name none.

    Raises:
        InputError: the folder is not there, or examples are no squares.
    """
    if config.cache_dir is None:
        return None
    _require_squares(config)
    if not config.cache_dir.is_dir():
        raise InputError(f"cache_dir {config.cache_dir} does not exist; `dpt data cache` fills one")
    found = CachedEncodings(config.cache_dir, backbone, size, config.cache_dtype)
    for cache in (found.latents, found.text):
        for line in cache.elsewhere():
            log.warning("cache_dir %s has no %s of this run, but some of %s", config.cache_dir, cache.spec.kind, line)
    return found


def run_cache(config: CacheConfig) -> dict[str, Any]:
    """Fill the cache with all that training can ask for. Every process of a launcher takes blocks that nobody has.

    Raises:
        InputError: no cache_dir, random crops, loader processes, scenes without an end, a picture that cannot be read.
    """
    data = config.data
    if data.cache_dir is None:
        raise InputError("`dpt data cache` needs cache_dir, the folder to fill")
    _require_squares(data)
    if not data.center_crop:
        raise InputError("random crops never come back, so they cannot be cached; set center_crop")
    if data.dataset == "scenes" and data.max_samples is None:
        raise InputError("scenes are drawn without an end; give max_samples, here and in training")
    if data.dataloader_num_workers:
        raise InputError(
            "dataloader_num_workers is for training; start `dpt data cache` with a launcher, or several times"
        )
    model = config.model
    state = processes(model.device)
    backbone = load_backbone(model.pretrained_model_name_or_path, model.revision, model.device, model.dtype)
    size = data.resolution or min(backbone.image_size)
    cached = CachedEncodings(data.cache_dir, backbone, size, data.cache_dtype)
    records = open_records(data, "train", size)
    parts = [records[at : at + config.block_size] for at in range(0, len(records), config.block_size)]
    shares, bad = _shares(records, config.block_size), Faults(data.on_bad)
    names = [_block_name(records, share, data, size) for share in shares]
    texts = _text_blocks(parts)
    text_names = [content_key(*map(text_key, block)).hex() for block in texts]

    def first(blocks: Sequence[Any]) -> int:
        return len(blocks) * state.process_index // state.num_processes

    def encode(number: int, beat: Callable[[], None]) -> tuple[list[Key], Columns, int]:
        squares = _squares_of(records, shares[number], data, size, bad)
        return _latents(cached, squares, config.vae_batch_size, beat)

    state.wait_for_everyone()  # who was loaded first would have done a small data set alone
    latents = fill(cached.latents, names, encode, first(names))
    text = fill(cached.text, text_names, lambda n, beat: _text(cached, texts[n], beat), first(texts))
    left_out = sum(gathered([len(bad.found)], state))
    return _summary(gathered([(latents.rows, text.rows)], state), len(records), left_out, data.cache_dir, cached)


def _require_squares(data: TrainDataConfig) -> None:
    if data.aspect_buckets:
        raise InputError("a cache holds squares; leave out aspect_buckets or cache_dir")


def _summary(
    rows: Sequence[tuple[int, int]], records: int, left_out: int, root: Path, cached: CachedEncodings
) -> dict[str, Any]:
    cached.latents.refresh()
    cached.text.refresh()
    images, texts = (sum(column) for column in zip(*rows, strict=True))
    line = f"{records} records: {images} images and {texts} texts encoded; the cache has {len(cached.latents)} and "
    broken = [f"left out for a broken picture or box: {left_out}"] if left_out else []
    return {
        "records": records,
        "left_out": left_out,
        "images_encoded": images,
        "texts_encoded": texts,
        "by_process": [list(row) for row in rows],
        "images": len(cached.latents),
        "texts": len(cached.text),
        "cache_dir": str(root),
        "summary": [line + str(len(cached.text)), *broken, f"cache: {root}"],
    }


@torch.no_grad()
def _latents(
    cached: CachedEncodings, block: Iterable[Tensor], vae_batch_size: int, beat: Callable[[], None]
) -> tuple[list[Key], Columns, int]:
    """Every square of a block that the cache does not have."""
    shown: dict[Key, bool] = {}  # and whether it was in the cache

    def missing() -> Iterator[Tensor]:  # as they are asked for: a block of large pictures would fill the memory
        for square in block:
            key = pixels_key(square)
            if key not in shown:
                shown[key] = key in cached.latents
                if not shown[key]:
                    yield square

    means, log_variances = [], []
    squares = missing()
    while batch := list(islice(squares, vae_batch_size)):
        pixels = torch.stack(batch).to(cached.backbone.device)
        mean, log_variance = cached.backbone.encode_posterior(pixels)
        means.append(mean.cpu())
        log_variances.append(log_variance.cpu())
        beat()
    columns = {"mean": torch.cat(means), "logvar": torch.cat(log_variances)} if means else {}
    return [key for key, known in shown.items() if not known], columns, sum(shown.values())


@torch.no_grad()
def _text(cached: CachedEncodings, texts: Sequence[str], beat: Callable[[], None]) -> tuple[list[Key], Columns, int]:
    missing = {key: text for text in texts if (key := text_key(text)) not in cached.text}
    parts = []
    texts_left = list(missing.values())
    for at in range(0, len(texts_left), TEXT_BATCH):
        parts.append(cached.backbone.encode_text(texts_left[at : at + TEXT_BATCH]))
        beat()
    if not parts:
        return [], {}, len(texts)
    states = TextStates.cat(parts)
    columns = {**{name: getattr(states, name) for name in PARTS}, **states.extras}
    return list(missing), columns, len(texts) - len(missing)


def _views(record: Record) -> list[tuple[ImageSource, Boxes]]:
    """All that `Examples` can show of a record, each a picture and the boxes that must stay in its square: as an
    example's own image (around an expression's boxes), as another's random one, and as a hard negative."""
    own = [(record.image, ()), *((record.image, expression.boxes) for expression in record.expressions)]
    wrong = () if record.negative_image is None else (record.negative_image, *record.more_negative_images)
    return own + [(image, ()) for image in wrong]


@dataclass(frozen=True, slots=True)
class _Share:
    """What a block has to do with a record."""

    record: int  # its place in the data set
    views: tuple[int, ...]  # numbers of those of its `_views` that this block encodes
    guest: bool  # the record is another block's, which looks at all of it and reports what is broken


def _shares(records: Sequence[Record], block_size: int) -> list[list[_Share]]:
    """Of each block its records, and the later ones that show a picture file of theirs.

    All views of a file are encoded by the first block that shows it, so that no two processes can be at the same square
    in one moment, whatever boxes it is cut around. One that is drawn, or lies in a shard or a row, is new each time.
    The records themselves are read again when their turn comes: millions would fill the memory.
    """
    blocks: list[list[_Share]] = [[] for _ in range(0, len(records), block_size)]
    homes: dict[Key, int] = {}  # file -> block
    seen: set[Key] = set()  # file and boxes
    for number, record in enumerate(records):
        block = number // block_size
        views: dict[int, list[int]] = {block: []}
        for view, (image, boxes) in enumerate(_views(record)):
            home, is_new = block, True
            if isinstance(image, Path):
                file, around = str(image).encode(), repr(boxes).encode()
                home = homes.setdefault(content_key(file), block)
                is_new = (key := content_key(file, around)) not in seen
                seen.add(key)
            if is_new:
                views.setdefault(home, []).append(view)
        for home, own in views.items():
            blocks[home].append(_Share(number, tuple(own), guest=home != block))
    return blocks


def _squares_of(
    records: Sequence[Record], shares: Iterable[_Share], data: TrainDataConfig, size: int, bad: Faults
) -> Iterator[Tensor]:
    """All squares of a block; what is broken in its own records is told to `bad`."""
    for share in shares:
        record = records[share.record]
        squares, fault = _squares(record, share, size, data)
        if fault is not None and not share.guest:
            bad.report(f"{record.source}/{record.id}", str(fault))
        yield from squares


def _squares(record: Record, share: _Share, size: int, data: TrainDataConfig) -> tuple[list[Tensor], InputError | None]:
    """Of the views in its share, and what is broken. Training leaves out a record with a broken view, but others may
    show the rest of them. Raises `InputError` where the config says so."""
    squares, fault = list[Tensor](), None
    source, picture = record.image, None
    for number, (wanted, boxes) in enumerate(_views(record)):
        if share.guest and number not in share.views:
            continue
        try:
            if picture is None or wanted is not source:
                source, picture = wanted, load_picture(wanted)
            record.require_inside(boxes, picture.size)
        except InputError as error:
            if data.on_bad == "error":
                raise
            fault = fault or error
            continue
        if number in share.views:
            square, kept = fit_square(picture, boxes, size)
            squares.append(to_pixels(square))
            if data.random_flip:
                squares.append(to_pixels(mirror(square, kept)[0]))
    return squares, fault


def _text_blocks(parts: Iterable[Sequence[Record]]) -> list[list[str]]:
    """Of each block of records the texts that no block before it has, where there are any: each text stands in one
    block, so that no two processes can be at it in the same moment."""
    seen: set[str] = set()
    blocks = []
    for part in parts:
        texts = dict.fromkeys(text for record in part for text in _texts(record))
        blocks.append([text for text in texts if text not in seen])
        seen.update(texts)
    return [block for block in blocks if block]


def _texts(record: Record) -> list[str]:
    negatives = record.negatives or [n for caption in record.captions for n in perturb(caption)]  # as training does
    others = (*(n.caption for n in negatives), *(e.text for e in record.expressions))
    return ["", *record.captions, *others]


def _block_name(records: Sequence[Record], shares: Sequence[_Share], data: TrainDataConfig, size: int) -> str:
    """Of all that decides which squares a block has. Where a record's key deceives, training looks by
    content, finds nothing, and encodes."""
    views = tuple((share.views, share.guest) for share in shares)
    keys = (record_key(records[share.record]) for share in shares)
    return content_key(repr((size, data.random_flip, views)).encode(), *keys).hex()


def _vocabularies(pipeline: Any) -> dict[str, str]:
    """Tokenizer -> hash of what it makes of a text, padding included."""
    tokenizers = {name: part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part}
    return {name: content_key(*(repr(part).encode() for part in _rules(one))).hex() for name, one in tokenizers.items()}


def _rules(tokenizer: Any) -> Iterator[Any]:
    """All that decides the tokens of a text."""
    yield sorted(tokenizer.get_vocab().items())
    yield tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.padding_side
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        told = json.loads(fast.to_str())  # `padding` and `truncation` are of the latest call
        yield {part: rule for part, rule in told.items() if part not in ("padding", "truncation")}


def _joined(hashes: dict[str, str]) -> str:
    return content_key(*(f"{name} {digest}".encode() for name, digest in sorted(hashes.items()))).hex()


def _inverse(order: Sequence[int]) -> Tensor:
    """Where each of 0..n-1 stands in `order`."""
    return torch.tensor(order).argsort()
