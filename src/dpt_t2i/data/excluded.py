"""Pictures that training must not see: those of RefCOCO's validation and test, which are COCO training pictures."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

from dpt_t2i.config import DataConfig
from dpt_t2i.data.mdetr import pictures_of
from dpt_t2i.data.records import ImageSource, Record, coco_image_id
from dpt_t2i.data.refcoco import HELD_OUT, held_out_images
from dpt_t2i.errors import InputError


def excluded_pictures(config: DataConfig, own: Sequence[Path] = ()) -> set[str]:
    """COCO image ids of `exclude_refs`, and of the held-out splits of the data set's own pickles.

    Args:
        own: files of the data set itself, where its format is RefCOCO's.

    Raises:
        InputError: a file cannot be read, or training is to run on a held-out split.
    """
    excluded: set[str] = set()
    for path in (*config.exclude_refs, *filter(_is_pickle, own)):
        excluded |= held_out_images(path) if _is_pickle(path) else pictures_of(path)
    if excluded and config.train_split in HELD_OUT:
        raise InputError(f"train_split {config.train_split} is a held-out split of RefCOCO; train on `train`")
    return excluded


def without(record: Record, pictures: set[str], captions: Container[str] = ()) -> Record:
    """The record without the hard-negative images that show one of `pictures` (COCO ids, or files as `Record.picture`
    names them), and without the hard captions among `captions`."""
    sources = [image for image in (record.negative_image, *record.more_negative_images) if image is not None]
    kept = [image for image in sources if not _shows(image, pictures)]
    negatives = tuple(negative for negative in record.negatives if negative.caption not in captions)
    if len(kept) == len(sources) and len(negatives) == len(record.negatives):
        return record
    return replace(
        record,
        negatives=negatives,
        negative_image=kept[0] if kept else None,
        more_negative_images=tuple(kept[1:]),
        paired=record.paired and kept[:1] == sources[:1] and negatives[:1] == record.negatives[:1],
    )


def _shows(image: ImageSource, pictures: set[str]) -> bool:
    return isinstance(image, Path) and (str(image) in pictures or coco_image_id(image.name) in pictures)


def _is_pickle(path: Path) -> bool:
    return path.suffix in (".p", ".pkl", ".pickle")
