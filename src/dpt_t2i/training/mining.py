"""`dpt data mine`: the encoder, the folder, and what is written into it."""

from __future__ import annotations

import logging
from typing import Any

from dpt_t2i.backbones.image_text import load_image_text
from dpt_t2i.backbones.loading import resolve_device
from dpt_t2i.config import MineConfig
from dpt_t2i.data.approximate import choose_search, nearest_by_index
from dpt_t2i.data.imagefolder import read_imagefolder, read_rows, write_rows
from dpt_t2i.data.mine import RULE, add_mined, embed, nearest, write_mined
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.shares import processes

KNOWS_SCENES = (
    "the bundled encoder knows the drawn world alone; for pictures of another kind give --encoder, for instance "
    "openai/clip-vit-large-patch14"
)

log = logging.getLogger(__name__)


def run_mine(config: MineConfig) -> dict[str, Any]:
    """Write `mined.jsonl` and the negatives into the folder; several processes embed a part each, the main one writes.

    Raises:
        InputError: no such folder or encoder, fewer than two records, a picture that cannot be read, or no faiss.
    """
    state = processes(config.device)
    rows, records = read_rows(config.dataset), read_imagefolder(config.dataset)
    if len(records) < 2:
        raise InputError(f"{config.dataset} has one record; negatives are mined among several")
    search = choose_search(config.search, len(records))
    encoder = load_image_text(config.encoder, config.device)
    share = (state.process_index, state.num_processes)
    images, texts = embed(records, encoder, config.output_dir, config.encode_batch_size, share)
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    place = resolve_device(config.device)
    vectors = images.to(place), texts.to(place)
    near = nearest_by_index if search == "faiss" else nearest
    found = list(near(*vectors, config.top_k, config.duplicate_cosine, root=config.output_dir))
    settings = {
        "top_k": config.top_k,
        "duplicate_cosine": config.duplicate_cosine,
        "search": search,
        "records": len(records),
    }
    write_mined(config.dataset, encoder, settings, rows, found)
    mined = add_mined(rows, found)
    write_rows(config.dataset, mined)
    captions = sum(negative["rule"] == RULE for row in mined for negative in row.get("negatives") or ())
    unknown = [KNOWS_SCENES] if config.encoder == "bundled" else []
    bare = sum(not row.captions for row in found)
    return {
        "records": len(records),
        "captions": captions,
        "records_without": bare,
        "encoder": encoder.name,
        "fingerprint": dict(encoder.fingerprint),
        "summary": [
            f"{captions} captions mined for {len(records)} records by {encoder.name}; {bare} records have none, "
            "all others being near-duplicates",
            *unknown,
        ],
    }
