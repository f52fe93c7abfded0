"""Files damaged at random: each reader gives a clean error or valid records, nothing else.

The fast tests try 200 cases a reader, the slow ones 10,000; `python -m benchmarks.fuzz` writes down how these end. A
case is a seed: it changes bytes of a sound file, or, in JSON, values of its tree.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from dpt_t2i.config import DataConfig
from dpt_t2i.data import hub
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.imagefolder import METADATA
from dpt_t2i.data.records import Record
from dpt_t2i.data.shards import stream_shards
from dpt_t2i.data.sources import read_source
from dpt_t2i.errors import InputError
from tests.data import writers

FILES = {
    "imagefolder": METADATA,
    "coco": "annotations/captions_train2017.json",
    "coco instances": "annotations/instances_train2017.json",
    "refcoco": "refs(unc).p",
    "refcoco instances": "instances.json",
    "mdetr": "finetune_toy_train.json",
    "hard_negatives": "train_hard_neg.tsv",
    "hard_negatives folder": "train_hard_neg/00000.json",
    "webdataset": "train-0000.tar",
    "webdataset streamed": "train-0000.tar",
    "huggingface": "rows.jsonl",
}
ODD: tuple[Callable[[], Any], ...] = (
    lambda: None,
    lambda: True,
    lambda: 0,
    lambda: -1,
    lambda: 10**400,
    lambda: 1e308,
    lambda: float("nan"),
    lambda: float("-inf"),
    lambda: "",
    lambda: " ",
    lambda: "7",
    lambda: "\ud800",
    lambda: "\0",
    lambda: "../../..",
    lambda: "x" * 5000,
    list,
    dict,
    lambda: [[[]]],
    lambda: [0, 0, -1, 3],
    lambda: [0, 1, 2],
)
BYTES = [
    b"\xff",
    b"\0",
    b"\n",
    b'"',
    b"{",
    b"]",
    b"\t",
    b"\xef\xbb\xbf",
    b"R",
    b"cos\nsystem\n",
    b"NaN",
    b"9" * 20,
    b"",
]


def write(form: str, folder: Path) -> Path:
    records = writers.scenes(2)
    kind = form.partition(" ")
    if form == "imagefolder":
        writers.save_images(records, folder)
        rows = [writers.native_row(r) | {"file_name": writers.file_name(i)} for i, r in enumerate(records)]
        (folder / METADATA).write_text("\n".join(map(json.dumps, rows)))
        return folder
    if form == "huggingface":
        writers.save_images(records, folder)
        rows = [
            writers.native_row(r) | {hub.COLUMN: {"bytes": None, "path": str(folder / writers.file_name(i))}}
            for i, r in enumerate(records)
        ]
        (folder / FILES[form]).write_text("\n".join(map(json.dumps, rows)))
        return folder
    if form == "hard_negatives folder":
        return writers.write_release_folder(records, folder)
    makers: dict[str, Callable[..., Path]] = {
        "coco": writers.write_coco,
        "refcoco": writers.write_refcoco,
        "mdetr": writers.write_mdetr,
        "hard_negatives": writers.write_release_tsv,
        "webdataset": writers.write_shards,
    }
    return makers[kind[0]](records, folder)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def damage(data: bytes, rng: random.Random, shape: str | None) -> bytes:
    if shape is not None and rng.random() < 0.5:
        tree = [json.loads(line) for line in data.splitlines()] if shape == "lines" else json.loads(data)
        for _ in range(rng.randint(1, 3)):
            container, key = rng.choice(list(places(tree)) or [([0], 0)])
            container[key] = rng.choice(ODD)()
        return "\n".join(map(json.dumps, tree)).encode() if shape == "lines" else json.dumps(tree).encode()
    for _ in range(rng.randint(1, 4)):
        at, cut = rng.randint(0, len(data)), rng.randint(0, 8)
        new = rng.choice(BYTES) if rng.random() < 0.7 else rng.randbytes(rng.randint(0, 6))
        data = data[:at] + new + data[at + cut :]
    return data[: rng.randint(0, len(data))] if rng.random() < 0.1 else data


def assert_valid(record: Record) -> None:
    assert record.id is not None and record.captions
    assert all(isinstance(caption, str) and caption.strip() for caption in record.captions)
    "".join([record.id, record.source, *record.captions]).encode("utf-8")
    for expression in record.expressions:
        assert expression.boxes and len(expression.boxes) == len(expression.spans)
        for start, end in expression.spans:
            assert expression.text[start:end].strip() and 0 <= start < end <= len(expression.text)
        for _, _, w, h in expression.boxes:
            assert w > 0 and h > 0 and w < float("inf") and h < float("inf")
    try:
        assert isinstance(record.load_image(), Image.Image)
    except InputError:
        pass


class Table:
    """What `datasets` gives for a file of JSON lines, as far as the reader looks at it."""

    def __init__(self, file: Path, without: str | None = None) -> None:
        self.file, self.rows = file, [json.loads(line) for line in file.read_bytes().splitlines()]
        for row in self.rows if without else []:
            if isinstance(row, dict):
                row.pop(without, None)
        self.column_names = [hub.COLUMN]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __getitem__(self, row: int) -> Any:
        found = self.rows[row]
        return (
            found if isinstance(found, dict) and hub.COLUMN in found else {hub.COLUMN: None}
        )  # columns are never lacking

    def remove_columns(self, name: str) -> "Table":
        return Table(self.file, name)


def read_table(folder: Path, faults: Faults) -> Iterator[Record]:
    """The hub's reader, without the library."""
    load = patch.object(hub, "_load", lambda name, *_: hub._reach(name, Table, folder / FILES["huggingface"]))
    with load, patch.object(hub, "_undecoded", lambda table: table):
        yield from hub.read_hub("toy", "train", faults=faults)


def read(form: str, folder: Path, faults: Faults) -> Iterator[Record]:
    if form == "huggingface":
        return read_table(folder, faults)
    if form == "webdataset streamed":
        return stream_shards([str(folder / FILES[form])], faults=faults)
    return read_source(DataConfig(dataset=str(folder), data_format=form.partition(" ")[0]), "train", faults)


def fuzz(form: str, folder: Path, cases: int, tally: dict[str, int] | None = None) -> None:
    write(form, folder)
    target = folder / FILES[form]
    sound = target.read_bytes()
    shape = {".json": "tree", ".jsonl": "lines"}.get(target.suffix)

    @settings(
        max_examples=cases,
        deadline=None,
        phases=(Phase.generate,),
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def check(seed: int) -> None:
        target.write_bytes(damage(sound, random.Random(seed), shape))
        for mode in ("error", "skip"):
            outcome = "records"
            try:
                for record in read(form, folder, Faults(mode)):
                    assert_valid(record)
            except InputError as error:
                named = "`toy`" if form == "huggingface" else str(folder)
                assert named in str(error) or target.name in str(error), "it names what is broken"
                outcome = "refused"
            if tally is not None:
                tally[f"{mode} {outcome}"] = tally.get(f"{mode} {outcome}", 0) + 1

    check()


@pytest.mark.parametrize("form", FILES)
def test_a_sound_file_gives_its_records(tmp_path: Path, form: str) -> None:
    write(form, tmp_path)
    assert list(read(form, tmp_path, Faults()))


@pytest.mark.parametrize("form", FILES)
def test_200_damaged_files(tmp_path: Path, form: str) -> None:
    tally: dict[str, int] = {}
    fuzz(form, tmp_path, 200, tally)
    assert tally["error refused"] > 0 and tally["skip records"] > 0, "neither all is refused nor all taken"


@pytest.mark.slow
@pytest.mark.parametrize("form", FILES)
def test_10_000_damaged_files(tmp_path: Path, form: str) -> None:
    fuzz(form, tmp_path, 10_000)


def test_the_damage_is_seen(tmp_path: Path) -> None:
    tally: dict[str, int] = {}
    fuzz("coco", tmp_path, 100, tally)
    assert tally["error refused"] > 20 and tally["error records"] > 0 and tally["skip records"] > tally["error records"]
