"""Where the files of each format lie: as the data sets are unpacked, unless the config names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dpt_t2i.config import DataConfig
from dpt_t2i.data.shards import is_address, shard_names
from dpt_t2i.errors import InputError

TAR_ENDS = (".tar", ".tar.gz", ".tgz")

# Names of annotation files below `dataset`; {split} is the split's name.
PATTERNS = {
    "coco": tuple(f"{at}{kind}_{{split}}*.json" for at in ("annotations/", "") for kind in ("captions", "instances")),
    "refcoco": ("refs(*).p", "instances.json"),
    "hard_negatives": ("{split}*.tsv", "{split}*/imgname2txtid.json"),
    "webdataset": tuple(f"{{split}}{at}*{end}" for at in ("", "/") for end in TAR_ENDS),
    "mdetr": ("*_{split}.json", "annotations/*_{split}.json"),  # last: its names are like others' too
}


def annotation_files(config: DataConfig, form: str, split: str, held_out: bool) -> Sequence[Path]:
    """The files of a split: those that the config names, else those in the folder; () where there are none.

    Raises:
        InputError: a file that the config names does not exist, or the folder does not.
    """
    named = config.val_annotations if held_out else config.annotations
    for path in named:
        if not path.exists():
            raise InputError(f"annotation file {path} does not exist")
    if named:
        return named
    if held_out and config.annotations and form != "refcoco":
        return ()  # the files to train on were named, so the folder's others are not meant
    if held_out and config.annotations:
        return config.annotations  # one file holds all splits
    folder = Path(config.dataset)
    if not folder.is_dir():
        mend = ""
        if form == "webdataset" and config.dataset.endswith(TAR_ENDS):
            mend = "; shards named one by one or by a pattern are read with --streaming, or give their folder"
        raise InputError(f"data set folder {folder} does not exist{mend}")
    found = [path for pattern in PATTERNS[form] for path in sorted(folder.glob(pattern.format(split=split)))]
    files = [path.parent if path.name == "imgname2txtid.json" else path for path in found]
    return tuple(dict.fromkeys(files))


def streamed_shards(config: DataConfig) -> tuple[list[str], list[str]]:
    """Tar shards to train on and held-out ones: files or addresses; without held-out ones the last shard is held out.

    Raises:
        InputError: there are no shards, only one, or a file that does not exist.
    """
    if is_address(config.dataset) or config.dataset.endswith(TAR_ENDS):
        train = [name for part in config.dataset.split(",") for name in shard_names(part)]
        missing = [name for name in train if not is_address(name) and not Path(name).is_file()]
        if missing:
            raise InputError(f"shard {missing[0]} does not exist ({len(missing)} of {len(train)} are missing)")
        held_out = [
            re.sub(r"^(https?):/+", r"\1://", str(path)) for path in config.val_annotations
        ]  # a path loses one /
    else:
        train, held_out = (
            [str(path) for path in annotation_files(config, "webdataset", split, held)]
            for split, held in ((config.train_split, False), (config.val_split, True))
        )
    if len(train) < 2 and not held_out:
        raise InputError(f"{config.dataset}: {len(train)} tar shards, of which the last is held out; give more")
    return (train, held_out) if held_out else (train[:-1], train[-1:])


def layout_of(folder: Path, splits: Sequence[str]) -> str | None:
    """The format whose files of one of `splits` lie in `folder`; None where they are nobody's."""
    for form, names in PATTERNS.items():
        if any(next(folder.glob(name.format(split=split)), None) for name in names for split in splits):
            return form
    return None


def patterns(form: str, split: str) -> str:
    """What `annotation_files` looks for, in words."""
    return ", ".join(pattern.format(split=split) for pattern in PATTERNS[form])


def image_folder(config: DataConfig, files: Sequence[Path]) -> Path:
    """The folder of the images: `image_root`; else, below `dataset`, the one that an annotation file is named after
    (`train2017` of captions_train2017.json), `train2014`, `images`, or `dataset` itself.

    Raises:
        InputError: `image_root` does not exist.
    """
    if config.image_root is not None:
        if not config.image_root.is_dir():
            raise InputError(f"image_root {config.image_root} is no folder")
        return config.image_root
    folder = Path(config.dataset)
    named = [match[1] for path in files if (match := re.search(r"_([a-z]+\d*)$", path.stem))]
    for name in (*named, *(f"images/{part}" for part in named), "train2014", "images"):
        if (folder / name).is_dir():
            return folder / name
    return folder
