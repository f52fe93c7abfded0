"""Drawn scenes written in each foreign format, with nothing that the format cannot hold."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpt_t2i.data.records import Record
from dpt_t2i.data.scenes import SceneRecords

SIZE = 64
FIRST_ID = 21  # of the first picture, as if it were COCO's


def scenes(count: int, seed: int = 5) -> Sequence[Record]:
    return list(SceneRecords("train", count, SIZE, seed=seed))


def file_name(index: int) -> str:
    return f"COCO_train2014_{FIRST_ID + index:012d}.png"


def save_images(records: Sequence[Record], folder: Path) -> None:
    """The pictures, and beside them the hard negatives as further pictures of the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, record in enumerate(records):
        record.load_image().save(folder / file_name(index))
        negative = record.load_negative_image()
        if negative is not None:
            negative.save(folder / file_name(500 + index))


def image_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": FIRST_ID + first + i, "file_name": file_name(first + i), "width": SIZE, "height": SIZE}
        for i in range(count)
    ]


def write_json(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def write_captions(records: Sequence[Record], path: Path) -> Path:
    captions = [
        {"id": 10 * i + j, "image_id": FIRST_ID + i, "caption": caption}
        for i, record in enumerate(records)
        for j, caption in enumerate(record.captions)
    ]
    return write_json(path, {"images": image_rows(len(records)), "annotations": captions})


def things_of(record: Record) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Name and box of everything that an expression names alone; the name is its span."""
    return [(e.text[slice(*e.spans[0])], e.boxes[0]) for e in record.expressions if len(e.boxes) == 1]


def write_coco(records: Sequence[Record], folder: Path, split: str = "train") -> Path:
    """captions_ and instances_: one category for each name of a thing."""
    save_images(records, folder / f"{split}2017")
    write_captions(records, folder / "annotations" / f"captions_{split}2017.json")
    names = sorted({name for record in records for name, _ in things_of(record)})
    things = [
        {
            "id": 100 * i + j,
            "image_id": FIRST_ID + i,
            "category_id": names.index(name),
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [[0, 0, 1, 1, 0, 1]],
        }
        for i, record in enumerate(records)
        for j, (name, box) in enumerate(things_of(record))
    ]
    tree = {
        "images": image_rows(len(records)),
        "annotations": things,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    write_json(folder / "annotations" / f"instances_{split}2017.json", tree)
    return folder


def write_refcoco(records: Sequence[Record], folder: Path, splits: Sequence[str] = ("train",), by: str = "unc") -> Path:
    """refs(BY).p, instances.json and COCO's captions; picture i belongs to split i modulo their number."""
    save_images(records, folder / "train2014")
    write_captions(records, folder / "captions_train2014.json")
    refs, annotations = [], []
    for i, record in enumerate(records):
        for j, expression in enumerate(e for e in record.expressions if len(e.boxes) == 1):
            key = 100 * i + j
            annotations.append({"id": key, "image_id": FIRST_ID + i, "category_id": 1, "bbox": expression.boxes[0]})
            sentence = {"sent": expression.text, "raw": expression.text, "sent_id": key, "tokens": ["x"]}
            refs.append(
                {
                    "ref_id": key,
                    "ann_id": key,
                    "image_id": FIRST_ID + i,
                    "split": splits[i % len(splits)],
                    "file_name": file_name(i),
                    "category_id": 1,
                    "sentences": [sentence],
                    "sent_ids": [key],
                }
            )
    tree = {
        "images": image_rows(len(records)),
        "annotations": annotations,
        "categories": [{"id": 1, "name": "shape"}],
    }
    write_json(folder / "instances.json", tree)
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol=0))  # as Python 2 wrote it
    return folder


def write_mdetr(records: Sequence[Record], folder: Path, split: str = "train") -> Path:
    """finetune_scenes_{split}.json and COCO's captions beside it."""
    save_images(records, folder / "train2014")
    write_captions(records, folder / f"captions_{split}.json")
    images, annotations = [], []
    for i, record in enumerate(records):
        row = image_rows(1, i)[0]
        for expression in record.expressions:
            key = len(images)
            images.append(
                row | {"id": key, "original_id": row["id"], "caption": expression.text, "dataset_name": "toy"}
            )
            for box, span in zip(expression.boxes, expression.spans, strict=True):
                named = {"bbox": list(box), "tokens_positive": [list(span)], "area": 1, "iscrowd": 0}
                annotations.append(named | {"id": len(annotations), "image_id": key, "category_id": 1})
    write_json(folder / f"finetune_toy_{split}.json", {"images": images, "annotations": annotations, "categories": []})
    return folder


def release_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "filepath": file_name(i),
            "title": record.captions[0],
            "neg_caption": repr([negative.caption for negative in record.negatives]),
            "neg_image": repr([file_name(500 + i)]),
        }
        for i, record in enumerate(records)
    ]


def write_release_tsv(records: Sequence[Record], folder: Path, split: str = "train") -> Path:
    save_images(records, folder / "images")
    rows = release_rows(records)
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (folder / f"{split}_hard_neg.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_release_folder(records: Sequence[Record], folder: Path, split: str = "train") -> Path:
    save_images(records, folder / "images")
    rows, place = release_rows(records), folder / f"{split}_hard_neg"
    for number, row in enumerate(rows):
        write_json(place / f"{number:05d}.json", row)
    write_json(place / "imgname2txtid.json", {row["filepath"]: [number] for number, row in enumerate(rows)})
    return folder


def native_row(record: Record) -> dict[str, Any]:
    return {
        "captions": list(record.captions),
        "expressions": [{"text": e.text, "spans": e.spans, "boxes": e.boxes} for e in record.expressions],
        "negatives": [{"caption": n.caption, "rule": n.rule} for n in record.negatives],
    }


def write_shards(
    records: Sequence[Record],
    folder: Path,
    shards: int = 2,
    split: str = "train",
    fields: Sequence[dict[str, Any]] | None = None,
) -> Path:
    """`fields`: what each record's .json has beside the native ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{split}-{shard:04d}.tar", "w") as tar:
            for index in range(shard, len(records), shards):
                record = records[index]
                members = {
                    "png": png(record.load_image()),
                    "negative.png": png(record.load_negative_image()),
                    "json": json.dumps(native_row(record) | (fields[index] if fields else {})).encode(),
                    "txt": record.captions[0].encode(),
                }
                for suffix, data in members.items():
                    add(tar, f"{index:06d}.{suffix}", data)
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
