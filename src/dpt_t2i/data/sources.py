"""Which records a `data:` section means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dpt_t2i.config import DataConfig
from dpt_t2i.data.imagefolder import read_imagefolder
from dpt_t2i.data.records import Record
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError

SCENES_TRAIN = 1_000_000  # drawn when asked for: the number only fixes the length of an epoch


def open_records(config: DataConfig, split: Literal["train", "val"], resolution: int) -> Sequence[Record]:
    """Records of a split; scenes are drawn at `resolution` pixels.

    An imagefolder may have `train/` and `val/`; else its last `val_samples` are held out.

    Raises:
        InputError: the folder is missing, or too small to hold anything out.
    """
    if config.dataset == "scenes":
        length = config.val_samples if split == "val" else config.max_samples or SCENES_TRAIN
        return SceneRecords(split, length, resolution, config.data_seed)
    folder = Path(config.dataset)
    if not folder.is_dir():
        raise InputError(f"data set `{config.dataset}` is neither `scenes` nor a folder")
    if (folder / split).is_dir():
        records = read_imagefolder(folder / split)
        return records[: config.val_samples if split == "val" else config.max_samples]
    records = read_imagefolder(folder)
    if len(records) < config.val_samples + 2:
        raise InputError(f"{folder} has {len(records)} records, too few to hold out val_samples={config.val_samples}")
    held = records[-config.val_samples :]
    return held if split == "val" else records[: -config.val_samples][: config.max_samples]
