"""Streamed shards: every record once a pass, whoever streams it, and a run that goes on sees what it would have."""

import gzip
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpt_t2i.config import TrainDataConfig
from dpt_t2i.data.examples import Part, View
from dpt_t2i.data.layouts import streamed_shards
from dpt_t2i.data.shards import shard_names
from dpt_t2i.data.sources import open_records
from dpt_t2i.data.streams import ShardStream, open_stream, shuffled
from dpt_t2i.errors import InputError
from tests.data import writers

RECORDS, SHARDS = 12, 6  # two records a shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writers.write_shards(writers.scenes(RECORDS), tmp_path_factory.mktemp("shards"), shards=SHARDS)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    found = [record.captions[0] for record in writers.scenes(RECORDS)]
    assert len(set(found)) == RECORDS
    return found


def stream(folder: Path, **settings: Any) -> ShardStream:
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return ShardStream(shards, 32, 3, View(), **({"buffer": 3} | settings))


def shown(source: ShardStream, part: Part, workers: int = 0) -> list[str]:
    return [caption for batch in source.loader(part, workers) for caption in batch.captions]


def test_a_buffer_shows_each_record_once_in_another_order():
    records: Sequence[Any] = range(10)
    for buffer in (2, 4, 10, 99):
        order = [pool[place] for pool, place in shuffled(records, buffer, np.random.default_rng(0))]
        assert sorted(order) == list(range(10)) and order != list(range(10)), buffer


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (1, 2)])
def test_a_pass_shows_every_record_once_over_ranks_and_workers(folder, captions, world, workers):
    streams = world * max(1, workers)
    steps = RECORDS // streams // 2 * max(1, workers)  # batches of two, until each stream has had its share
    for turn in range(2):
        seen = [
            caption
            for rank in range(world)
            for caption in shown(stream(folder), Part(2, 1, rank, world, turn * steps, (turn + 1) * steps), workers)
        ]
        assert Counter(seen) == Counter(captions), f"pass {turn}"


def test_passes_and_seeds_have_their_own_orders(folder):
    first, second = (shown(stream(folder), Part(2, first_step=at, steps=at + 6)) for at in (0, 6))
    assert first != second and sorted(first) == sorted(second)
    other = ShardStream(stream(folder).shards, 32, 4, View(), buffer=3)
    assert shown(other, Part(2, steps=6)) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(folder, workers):
    whole = [batch.captions for batch in stream(folder).loader(Part(2, 3, 0, 1, 0, 4), workers)]
    rest = [batch.captions for batch in stream(folder).loader(Part(2, 3, 0, 1, 1, 4), workers)]
    assert len(whole) == 12 and rest == whole[3:]


def test_another_number_of_processes_is_another_stream(folder):
    ours = stream(folder).identity(0, 1)
    assert ours == stream(folder).identity(1, 1) != stream(folder).identity(0, 2)


def test_a_record_has_one_number_among_all_streams(folder):
    numbers = [
        item.record for number in (0, 1) for item in itertools.islice(stream(folder).items(number, 2), RECORDS // 2)
    ]
    assert sorted(numbers) == list(range(RECORDS))


def test_the_random_negative_is_another_picture(folder, captions):
    for item in itertools.islice(stream(folder, buffer=2).items(0, SHARDS), 8):  # one shard: two records in all
        assert item.random_caption != item.caption and item.random_caption in captions
        assert not (item.random_pixels == item.pixels).all()


def test_streams_without_a_shard_are_refused(folder):
    with pytest.raises(InputError, match="6 shards cannot be dealt out to 8 streams"):
        stream(folder).loader(Part(2, world=4), workers=2)


def test_broken_shards_and_pictures_end_the_run_or_are_left_out(tmp_path, captions, caplog):
    folder = writers.write_shards(writers.scenes(RECORDS), tmp_path, shards=3)
    first, second, third = sorted(folder.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:1000])
    third.write_bytes(third.read_bytes().replace(b"\x89PNG", b"XXXX", 1))  # its first picture: record 2
    with pytest.raises(InputError, match="no whole tar|cannot read image"):
        shown(stream(folder), Part(2, steps=6))
    batches = list(stream(folder, on_bad="skip").loader(Part(2, steps=8), 0))  # two passes over eight whole records
    seen = Counter(caption for batch in batches for caption in batch.captions)
    whole = {captions[number] for number in range(RECORDS) if number % 3}
    assert set(seen) == whole - {captions[2]} and seen.total() == 16, "another stands in its place"
    for workers in (0, 2):  # as many streams, and none of them speaks itself
        batches = list(stream(folder, on_bad="skip").loader(Part(2, steps=8), workers))
        skipped = {message for batch in batches for message in batch.skipped}
        assert len(skipped) == 2 and not caplog.text, skipped
        assert {"no whole tar", "cannot read image"} == {
            said for said in ("no whole tar", "cannot read image") for message in skipped if said in message
        }
    for path in (second, third):
        path.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"no whole record in the shards of stream 0 of 1 \(the first fault: .*no whole tar"
    ):
        shown(stream(folder, on_bad="skip"), Part(2, steps=1))


def test_held_out_pictures_of_refcoco_are_never_shown(tmp_path, captions):
    scenes = writers.scenes(RECORDS)
    folder = tmp_path / "shards"
    rows = [{"image_id": number} for number in range(RECORDS)]
    writers.write_shards(scenes, folder, shards=2, fields=rows)
    source = stream(folder, excluded={"0", "7"})
    seen = Counter(shown(source, Part(2, steps=5)))
    assert seen == Counter(caption for number, caption in enumerate(captions) if number not in (0, 7))
    without_ids = writers.write_shards(scenes, tmp_path / "bare", shards=2)
    with pytest.raises(InputError, match="no `image_id`, which exclude_refs needs"):
        shown(stream(without_ids, excluded={"0"}), Part(2, steps=1))


def test_names_with_a_range():
    assert shard_names("a.tar") == ["a.tar"]
    assert shard_names("http://h/t-{08..11}.tar") == [f"http://h/t-{n}.tar" for n in ("08", "09", "10", "11")]
    assert shard_names("{1..2}/{0..1}.tar") == ["1/0.tar", "1/1.tar", "2/0.tar", "2/1.tar"]


def config(folder: Path | str, **settings: Any) -> TrainDataConfig:
    return TrainDataConfig(dataset=str(folder), data_format="webdataset", streaming=True, **settings)


def test_the_last_shard_is_held_out_where_no_other_is(folder, captions):
    source = open_stream(config(folder), 32, View())
    assert [Path(shard).name for shard in source.shards] == [f"train-{n:04d}.tar" for n in range(SHARDS - 1)]
    held = open_records(config(folder, val_samples=9), "val", 32)
    assert [record.captions[0] for record in held] == [captions[5], captions[11]]
    named = config(folder / "train-{0000..0002}.tar", val_annotations=(folder / "train-0004.tar",), val_samples=1)
    assert len(open_stream(named, 32, View()).shards) == 3
    assert [record.captions[0] for record in open_records(named, "val", 32)] == [captions[4]]


@pytest.mark.parametrize(
    ("dataset", "settings", "says"),
    [
        ("train-{0..8}.tar", {}, r"shard .*train-0.tar does not exist \(9 of 9 are missing\)"),
        ("train-0000.tar", {}, "1 tar shards, of which the last is held out"),
        ("", {"max_samples": 5}, "max_samples does not go with streamed shards"),
        ("", {"train_split": "tset"}, "0 tar shards"),
    ],
)
def test_what_cannot_be_streamed_is_one_clear_error(folder, dataset, settings, says):
    with pytest.raises(InputError, match=says):
        open_stream(config(folder / dataset, **settings), 32, View())
    with pytest.raises(InputError, match="streamed shards have no index"):
        open_records(config(folder), "train", 32)


def test_shards_may_be_compressed_and_lie_behind_any_address(folder, captions, tmp_path):
    for name in ("train-0000", "train-0001"):
        with gzip.open(tmp_path / f"{name}.tar.gz", "wb") as file:
            file.write((folder / f"{name}.tar").read_bytes())
    named = config(tmp_path / "train-{0000..0001}.tar.gz", val_samples=9)
    assert [record.captions[0] for record in open_records(named, "val", 32)] == [captions[1], captions[7]]
    found = config(tmp_path, val_samples=9)  # the folder's own, by their names
    assert open_stream(found, 32, View()).shards == open_stream(named, 32, View()).shards
    for far in ("https://h/t-{0..1}.tar.gz", "https://h/t-{0..1}.tar?key=a.b", "http://h/t-{0..1}"):
        assert streamed_shards(config(far))[0] == [far.replace("{0..1}", "0")]
    (held,) = streamed_shards(config("https://h/t.tar", val_annotations=("https://h/v.tar",)))[1]
    assert held == "https://h/v.tar", "which a path had shortened"
