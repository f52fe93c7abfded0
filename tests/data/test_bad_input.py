"""What is broken in a foreign file is named with file and record, and left out only where that is asked for."""

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpt_t2i.config import DataConfig
from dpt_t2i.data.examples import Examples, LeftOut
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.mdetr import pictures_of, read_mdetr
from dpt_t2i.data.records import Record
from dpt_t2i.data.shards import read_shards
from dpt_t2i.data.sources import open_records, read_source
from dpt_t2i.data.unpickling import read_plain_pickle
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.examples import examples_of
from tests.data import writers

WRITE: dict[str, Callable[..., Path]] = {
    "coco": writers.write_coco,
    "refcoco": writers.write_refcoco,
    "mdetr": writers.write_mdetr,
    "hard_negatives": writers.write_release_tsv,
    "webdataset": writers.write_shards,
}


def written(form: str, folder: Path, count: int = 4) -> Path:
    return WRITE[form](writers.scenes(count), folder)


def read(form: str, folder: Path, faults: Faults, **data: Any) -> list[Record]:
    return list(read_source(DataConfig(dataset=str(folder), data_format=form, **data), "train", faults))


def spoil(path: Path, change: Callable[[Any], Any]) -> None:
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(change(tree) or tree))


CAPTIONS, INSTANCES = "annotations/captions_train2017.json", "annotations/instances_train2017.json"
CASES = [
    ("coco", CAPTIONS, lambda t: t["annotations"][1].update(caption=7), r"annotations\[1\]: `caption` must be a text"),
    ("coco", CAPTIONS, lambda t: t["annotations"][1].update(caption="\ud800"), r"annotations\[1\]: .*surrogates"),
    ("coco", CAPTIONS, lambda t: t["annotations"][1].update(image_id=9), r"annotations\[1\]: image 9 is not in"),
    ("coco", CAPTIONS, lambda t: t["annotations"].append(None), r"annotations\[4\]: .* must be an object, not null"),
    ("coco", CAPTIONS, lambda t: t["images"].append(t["images"][0]), r"images\[4\]: the id `21` was there before"),
    ("coco", CAPTIONS, lambda t: t["images"][2].update(file_name="gone.png"), r"image 23: .*gone.png does not exist"),
    ("coco", CAPTIONS, lambda t: t["images"][2].update(file_name="a\0b"), r"image 23: .*a\\x00b' does not exist"),
    ("coco", CAPTIONS, lambda t: t["images"][2].update(file_name="x" * 9999), "image 23: .*too long"),
    ("coco", INSTANCES, lambda t: t["annotations"][0]["bbox"].__setitem__(2, 0), r"annotations\[0\]: .*without area"),
    ("coco", INSTANCES, lambda t: t["annotations"][0].update(bbox=[60, 0, 9, 9]), r"annotations\[0\]: .*outside"),
    ("coco", INSTANCES, lambda t: t["annotations"][0].update(bbox=[float("nan"), 0, 9, 9]), "must be finite"),
    ("coco", INSTANCES, lambda t: t["annotations"][0].update(bbox="1234"), "`bbox` must be a list"),
    ("coco", INSTANCES, lambda t: t["annotations"][0].update(category_id=99), "category 99 is not in the file"),
    ("refcoco", "instances.json", lambda t: t["annotations"].__delitem__(0), r"refs\(unc\).p, ref 0: annotation 0 of"),
    ("mdetr", "finetune_toy_train.json", lambda t: t["annotations"][0].update(tokens_positive=[[90, 99]]), "nothing"),
    ("mdetr", "finetune_toy_train.json", lambda t: t["images"][0].update(caption=[]), "image 0: `caption` must be a"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "file", "change", "says"), CASES)
def test_a_broken_record_is_named_or_left_out(tmp_path, form, file, change, says):
    folder = written(form, tmp_path)
    spoil(folder / file, change)
    with pytest.raises(InputError, match=says) as caught:
        read(form, folder, Faults())
    assert "\n" not in str(caught.value) and "on_bad: skip" in str(caught.value)
    assert str(folder) in str(caught.value)
    faults = Faults("skip")
    left = read(form, folder, faults)
    assert 3 <= len(left) <= 4 and 1 <= len(faults.found) <= 2
    assert len(faults.found) == len(set(faults.found)), "each is said once"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'{"images": 3}', b"\xff\xfe\x00", b"[" * 100_000])
@pytest.mark.parametrize(
    ("form", "file"), [("coco", CAPTIONS), ("refcoco", "instances.json"), ("mdetr", "finetune_toy_train.json")]
)
def test_a_file_that_is_no_annotation_file_ends_it_in_either_mode(tmp_path, form, file, content):
    folder = written(form, tmp_path, 2)
    (folder / file).write_bytes(content)
    for mode in ("error", "skip"):
        with pytest.raises(InputError, match=Path(file).stem):
            read(form, folder, Faults(mode))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("\tneg_image\n", "\tneg_images\n", "lacks the columns neg_image"),
        ("[", "__import__('os').system('x')[", "row 0: `neg_caption` is no Python list"),
        ("COCO_train2014_000000000021", "gone", "row 0: .*gone.png does not exist"),
    ],
)
def test_a_broken_tsv(tmp_path, old, new, says):
    folder = written("hard_negatives", tmp_path, 3)
    file = folder / "train_hard_neg.tsv"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=says):
        read("hard_negatives", folder, Faults())
    if "row" in says:
        assert len(read("hard_negatives", folder, Faults("skip"))) == 2


def test_a_tsv_row_that_is_cut_short_is_no_row_without_negatives(tmp_path):
    folder = written("hard_negatives", tmp_path, 3)
    file = folder / "train_hard_neg.tsv"
    lines = file.read_text().splitlines()
    columns = lines[0].split("\t")
    lines[2] = "\t".join(lines[2].split("\t")[: columns.index("title") + 1])
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="row 1: key 'neg_caption' is missing"):
        read("hard_negatives", folder, Faults())
    assert [record.id for record in read("hard_negatives", folder, Faults("skip"))] == ["0", "2"]


def test_names_that_are_no_utf8_are_faults_of_their_records(tmp_path):
    mdetr = writers.write_mdetr(writers.scenes(2), tmp_path / "mdetr") / "finetune_toy_train.json"
    tree = json.loads(mdetr.read_text())
    for row in tree["images"]:
        row["dataset_name"] = "\ud800"
    mdetr.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"original_id 21: .*surrogates not allowed"):
        list(read_mdetr([mdetr], tmp_path / "mdetr" / "train2014"))
    tree["images"][0]["original_id"] = None
    mdetr.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"image 0: `original_id` must be a whole number, not null"):
        pictures_of(mdetr)
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        writers.add(tar, "\udcff.png", writers.png(writers.scenes(1)[0].load_image()))
        writers.add(tar, "\udcff.txt", b"a")
    with pytest.raises(InputError, match="surrogates not allowed"):
        list(read_shards([shard]))


def test_a_row_in_another_encoding_is_one_fault(tmp_path):
    folder = written("hard_negatives", tmp_path, 3)
    file = folder / "train_hard_neg.tsv"
    lines = file.read_bytes().splitlines()
    cells = lines[2].split(b"\t")
    lines[2] = b"\t".join([cells[0], "ein grüner Kreis".encode("latin-1"), *cells[2:]])
    file.write_bytes(b"\n".join(lines) + b"\n")
    faults = Faults("skip")
    assert [r.id for r in read("hard_negatives", folder, faults)] == ["0", "2"]
    assert [f.where for f in faults.found] == [f"{file}, row 1"]


@pytest.mark.parametrize("keep", [100, 700, 5000])
def test_a_cut_tar_is_named(tmp_path, keep):
    shard = next(iter(written("webdataset", tmp_path, 6).glob("*-0000.tar")))
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"train-0000.tar: no whole uncompressed tar"):
        list(read_shards([shard]))
    faults = Faults("skip")
    assert len(list(read_shards([shard], faults))) < 3 and faults.found


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path):
    shard = next(iter(written("webdataset", tmp_path, 6).glob("*-0000.tar")))
    with tarfile.open(shard) as tar:
        fourth = tar.getmembers()[4].offset  # of the second sample
    data = bytearray(shard.read_bytes())
    data[fourth : fourth + 20] = b"#" * 20
    shard.write_bytes(data)
    with pytest.raises(InputError, match="no whole uncompressed tar"):
        list(read_shards([shard]))


class Exploit:
    """Pickled, it is a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_runs_nothing(tmp_path, protocol):
    touched, file = tmp_path / "touched", tmp_path / "refs(unc).p"
    file.write_bytes(pickle.dumps([{"split": "train", "x": Exploit(f"touch {touched}")}], protocol=protocol))
    with pytest.raises(InputError, match=r"refs\(unc\).p is refused: it holds (STACK_)?GLOBAL"):
        read_plain_pickle(file)
    assert not touched.exists()
    pickle.loads(file.read_bytes())
    assert touched.exists(), "the payload is a real one"


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(ios\nsystem\n.",
        b"(S'x'\nos\nsystem\no.",
        b"Ptoken\n.",
        b"\x80\x02\x82\x01.",
        b"\x8f.",
        b"]}\x86b.",
    ],
)
def test_every_other_way_out_of_plain_values_is_refused(tmp_path, program):
    file = tmp_path / "x.p"
    file.write_bytes(program)
    with pytest.raises(InputError, match="x.p is (refused|no whole pickle)"):
        read_plain_pickle(file)


def test_a_pickle_of_a_hostile_size_costs_no_memory(tmp_path):
    file = tmp_path / "x.p"
    file.write_bytes(b"\x80\x02]r\xff\xff\xff\xff.")  # LONG_BINPUT at 2^32 - 1: 64 GB in the C machine
    assert read_plain_pickle(file) == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_through_every_protocol(tmp_path, protocol):
    value = [{"a": (1, -2.5, 2**70, None, True), "b": ["text", "grün", ""], "c": (), "d": {}, "e": [[]] * 3}]
    file = tmp_path / "x.p"
    file.write_bytes(pickle.dumps(value, protocol=protocol))
    assert read_plain_pickle(file) == value


def test_strings_of_python_2_are_read_as_utf8(tmp_path):
    file = tmp_path / "x.p"
    file.write_bytes(b"(lp0\nS'gr\\xc3\\xbcn'\np1\naS'\\xff'\np2\na.")
    assert read_plain_pickle(file) == ["grün", "\ufffd"]


@pytest.mark.parametrize("form", ["coco", "webdataset"])
def test_a_corrupt_picture_ends_training_or_the_next_is_shown(tmp_path, form, caplog):
    folder = written(form, tmp_path, 6)
    if form == "coco":
        (folder / "train2017" / writers.file_name(2)).write_bytes(b"\xff\xd8\xff\xe0 cut")
    else:
        shard = folder / "train-0000.tar"
        with tarfile.open(shard) as tar:
            at = tar.getmember("000002.png").offset_data
        data = bytearray(shard.read_bytes())
        data[at : at + 8] = b"nopng!!!"
        shard.write_bytes(data)
    config = DataConfig(dataset=str(folder), data_format=form, val_samples=1, on_bad="skip")
    records = open_records(config, "train", 32)
    bad = next(row for row, record in enumerate(records) if record.id in ("23", "000002"))
    with pytest.raises(InputError, match="cannot read image .*00000[02]"):
        Examples(records, 32).item(0, bad)
    examples = Examples(records, 32, skip_bad=True)
    items = [examples.item(epoch, bad) for epoch in range(2)]
    assert all(item.record != bad for item in items)
    left_out = LeftOut()
    for item in items:
        left_out.report(item.skipped)
    said = [line for line in caplog.messages if "left out (" in line]
    assert len(said) == 1 and said[0].startswith("left out (1 so far): cannot read image "), "once"


def test_a_box_outside_a_picture_of_unknown_size_is_found_when_it_is_opened(tmp_path):
    folder = written("webdataset", tmp_path, 1)
    record = next(iter(read_shards(sorted(folder.glob("*.tar")))))
    wide = record.expressions[0].__class__("the dot", ((0, 7),), ((60.0, 0.0, 20.0, 9.0),))
    outside = Record("o", "toy", record.image, record.captions, (wide,))
    says = r"toy/o: box \[60.0, 0.0, 20.0, 9.0\] lies outside the image of 64 x 64"
    with pytest.raises(InputError, match=says):
        Examples([outside, record], 32).item(0, 0)
    with pytest.raises(InputError, match=says):
        next(examples_of([outside], 32))
