"""Which records a `data:` section means."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from dpt_t2i.config import DataConfig, TrainDataConfig
from dpt_t2i.data.coco import read_coco
from dpt_t2i.data.excluded import excluded_pictures, without
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.hub import read_hub, split_names
from dpt_t2i.data.imagefolder import METADATA, each_record
from dpt_t2i.data.index import RecordIndex, Selection
from dpt_t2i.data.layouts import annotation_files, image_folder, layout_of, patterns, streamed_shards
from dpt_t2i.data.mdetr import read_mdetr
from dpt_t2i.data.records import Record
from dpt_t2i.data.refcoco import read_refcoco
from dpt_t2i.data.release import read_release
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.data.shards import read_shards, stream_shards
from dpt_t2i.errors import InputError

log = logging.getLogger(__name__)

SCENES_TRAIN = 1_000_000  # drawn when asked for: the number only fixes the length of an epoch
UNREAD = {  # settings that a format does not read
    "scenes": ("image_root", "annotations", "val_annotations", "streaming", "exclude_refs"),
    "imagefolder": ("image_root", "annotations", "val_annotations", "streaming"),
    "huggingface": ("image_root", "annotations", "val_annotations"),
    "webdataset": ("image_root",),
    **dict.fromkeys(("coco", "refcoco", "mdetr", "hard_negatives"), ("streaming",)),
}
Side = Literal["train", "val"]


@dataclass(frozen=True)
class Counts:
    """What a source holds."""

    records: int
    captions: int
    expressions: int
    boxes: int
    without_expression: int  # records whose grounding loss is masked
    negatives: int  # hard captions
    without_negative: int  # records that have no hard caption of their own
    negative_images: int


def open_records(config: DataConfig, split: Side, resolution: int) -> Sequence[Record]:
    """Records of a split; scenes are drawn at `resolution` pixels.

    Where the source has no held-out part of its own, its last `val_samples` are held out, and with them every other
    record of the same pictures.

    Raises:
        InputError: files are missing or broken, too few records to hold anything out, a setting that the format does
            not read, or, with `on_bad: error`, a broken record.
    """
    refuse_unread(config)
    if config.dataset == "scenes" and config.data_format in ("auto", "scenes"):
        length = config.val_samples if split == "val" else config.max_samples or SCENES_TRAIN
        categories = config.scene_categories if split == "train" else ()
        log.info("%s: %d drawn scenes; --dataset names data of your own", split, length)
        return SceneRecords(split, length, resolution, config.data_seed, categories)
    if config.scene_categories:
        raise InputError(
            f"scene_categories choose among scenes, and the data set is `{config.dataset}`; leave them out"
        )
    faults = Faults(config.on_bad)
    records: Sequence[Record]
    if is_streamed(config):
        records = _of_stream(config, split, faults)
    elif _has_own(config):
        records = RecordIndex(read_source(config, split, faults))
        if split == "train":
            records = _without_held_out(config, records)
        limit, found = config.val_samples if split == "val" else config.max_samples, len(records)
        records = records[:limit]
        if split == "val" and len(records) < found:
            log.info("val: the first %d of %d held-out records; --val_samples takes more", len(records), found)
    else:
        records = RecordIndex(read_source(config, "train", faults))
        if len(records) < config.val_samples + 2:
            raise InputError(
                f"{config.dataset} has {len(records)} records, too few to hold out val_samples={config.val_samples}; "
                "give fewer --val_samples, or a held-out part of its own"
            )
        held = records[-config.val_samples :]
        told = len(held), len(records), config.val_split
        log.info("held out: the last %d of %d records; there is no part `%s`", *told)
        if split == "val":
            records = held
        else:
            seen = {record.picture for record in held}
            records = _keep(records[: -config.val_samples], lambda record: record.picture not in seen)
            if any(record.negative_image is not None for record in records):  # mined ones may lie in the tail
                texts = {caption for record in held for caption in record.captions}
                records = RecordIndex(without(record, seen, texts) for record in records)
            records = _without_held_out(config, records)[: config.max_samples]
    if split == "val" and config.on_bad == "skip":
        records = _keep(records, lambda record: _is_usable(record, faults))
    if not records:
        raise InputError(f"data set `{config.dataset}`: no record of split `{split}` is left")
    _tell(split, count(records), faults)
    return records


def is_streamed(config: DataConfig) -> bool:
    """Whether training reads tar shards from front to back (`data.streams`) and not at random."""
    return config.streaming and config.data_format == "webdataset"


def count(records: Sequence[Record]) -> Counts:
    """Go once through the records; no image is opened."""
    sums = [0] * 7
    for record in records:
        boxes = sum(len(expression.boxes) for expression in record.expressions)
        images = (record.negative_image is not None) + len(record.more_negative_images)
        numbers = (len(record.captions), len(record.expressions), boxes, not boxes)
        for place, number in enumerate((*numbers, len(record.negatives), not record.negatives, images)):
            sums[place] += int(number)
    return Counts(len(records), *sums)


def read_source(config: DataConfig, side: Side, faults: Faults) -> Iterator[Record]:
    """Every record of one side of a source other than `scenes`, nothing held out or excluded."""
    form = _format(config)
    split = config.val_split if side == "val" else config.train_split
    if form == "imagefolder":
        own = Path(config.dataset) / split
        if not own.is_dir() and split not in (DataConfig().train_split, DataConfig().val_split):
            raise InputError(f"{config.dataset} has no folder `{split}`; give another split, or the folder itself")
        yield from each_record(own if own.is_dir() else Path(config.dataset), faults)
        return
    if form == "huggingface":
        limit = config.val_samples if side == "val" else config.max_samples
        yield from read_hub(config.dataset, split, streaming=config.streaming, limit=limit, faults=faults)
        return
    files = annotation_files(config, form, split, side == "val")
    if not files:
        raise InputError(
            f"data_format {form}: none of {patterns(form, split)} in {config.dataset}; name the files with annotations"
        )
    root = image_folder(config, files)
    if form == "coco":
        yield from read_coco(files, root, faults)
    elif form == "refcoco":
        yield from read_refcoco(files, root, split, faults)
    elif form == "mdetr":
        yield from read_mdetr(files, root, faults)
    elif form == "webdataset":
        yield from read_shards(files, faults)
    else:
        for path in files:
            yield from read_release(path, root, faults)


def _of_stream(config: DataConfig, split: Side, faults: Faults) -> Sequence[Record]:
    """The first held-out records of shards that are streamed, kept in memory."""
    if split == "train":
        raise InputError("streamed shards have no index; shards on disk get one: leave out --streaming")
    shards = streamed_shards(config)[1]
    return RecordIndex(islice(stream_shards(shards, faults=faults), config.val_samples))


def refuse_unread(config: DataConfig) -> None:
    """A setting that nothing would read is a mistake: mostly the format was not said. Raises `InputError`."""
    form = "scenes" if config.dataset == "scenes" and config.data_format == "auto" else _format(config)
    unread = [name for name in UNREAD[form] if getattr(config, name)]
    if isinstance(config, TrainDataConfig) and not is_streamed(config):
        unread += [] if config.shuffle_buffer == TrainDataConfig().shuffle_buffer else ["shuffle_buffer"]
    if form == "scenes":
        plain = DataConfig()
        unread += [name for name in ("train_split", "val_split") if getattr(config, name) != getattr(plain, name)]
    if unread:
        raise InputError(
            f"{unread[0]} is not read from data of format {form}; leave it out, or say how "
            f"`{config.dataset}` is written (--data_format)"
        )


def _format(config: DataConfig) -> str:
    if config.data_format != "auto":
        return config.data_format
    if not Path(config.dataset).is_dir():
        raise InputError(
            f"data set `{config.dataset}` is neither `scenes` nor a folder; other sources need data_format"
        )
    folder = Path(config.dataset)
    bare = not (folder / METADATA).is_file() and not any(folder.glob(f"*/{METADATA}"))
    if bare and (form := layout_of(folder, (config.train_split, config.val_split))):
        raise InputError(f"{folder} has no {METADATA}, and files as of format {form}; give --data_format {form}")
    return "imagefolder"


def holds_out_tail(config: DataConfig) -> bool:
    """Whether the held-out records are the last `val_samples` of the source, which has no held-out part of its own."""
    return config.dataset != "scenes" and not is_streamed(config) and not _has_own(config)


def _has_own(config: DataConfig) -> bool:
    """Whether the source has a held-out part of its own.

    Raises:
        InputError: it has not, and one was named: the tail of what is trained on is no stand-in for that.
    """
    form = _format(config)
    found = _finds_part(config, form)
    if not found and config.val_split != DataConfig().val_split:
        raise InputError(f"{config.dataset} has no part `{config.val_split}`; give another --val_split")
    return found


def _finds_part(config: DataConfig, form: str) -> bool:
    if form == "huggingface":
        return config.val_split in split_names(config.dataset)
    if form == "refcoco":
        return True  # one file holds all splits
    if form == "imagefolder":
        return (Path(config.dataset) / config.val_split).is_dir()
    return bool(annotation_files(config, form, config.val_split, True))


def _without_held_out(config: DataConfig, records: Sequence[Record]) -> Sequence[Record]:
    """Leave out the records and the hard-negative images that show an image of RefCOCO's validation and test."""
    form = _format(config)
    own = annotation_files(config, form, config.train_split, False) if form == "refcoco" else ()
    excluded = excluded_pictures(config, own)
    if not excluded:
        if form in ("coco", "hard_negatives", "mdetr") and any(record.coco_id for record in records[:1]):
            log.warning(
                "nothing is left out of training: COCO's train2014 holds the pictures of RefCOCO's validation and "
                "test; before measuring on those give --exclude_refs 'refs(unc).p' (and umd, google)"
            )
        return records
    kept = _keep(records, lambda record: record.coco_id not in excluded)
    left = RecordIndex(without(record, excluded) for record in kept)
    images = count(kept).negative_images - count(left).negative_images
    log.info(
        "%d of %d records and %d hard-negative images left out of training: they show images of RefCOCO's "
        "validation and test splits",
        len(records) - len(kept),
        len(records),
        images,
    )
    if not any(record.coco_id for record in records):
        raise InputError("exclude_refs: no record of the data set tells its COCO image id; give `image_id`s")
    return left


def _keep(records: Sequence[Record], wanted: Callable[[Record], bool]) -> Sequence[Record]:
    return Selection(records, [row for row, record in enumerate(records) if wanted(record)])


def _is_usable(record: Record, faults: Faults) -> bool:
    try:
        size = record.load_image().size
        for expression in record.expressions:
            record.require_inside(expression.boxes, size)
        record.load_negative_image()
    except InputError as error:
        faults.report(f"{record.source}/{record.id}", str(error))
        return False
    return True


def _tell(split: Side, counts: Counts, faults: Faults) -> None:
    log.info(
        "%s: %d records, %d captions; hard negatives: %d captions, %d images, %d records have none of their own; "
        "grounding: %d expressions, %d records have none and their loss is masked%s",
        split,
        counts.records,
        counts.captions,
        counts.negatives,
        counts.negative_images,
        counts.without_negative,
        counts.expressions,
        counts.without_expression,
        f"; {faults.summary()}" if faults.found else "",
    )
