"""Tar shards: what makes a sample, and a stream that is dealt out without overlap."""

import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dpt_t2i.data.faults import Faults
from dpt_t2i.data.shards import read_shards, stream_shards
from dpt_t2i.errors import InputError
from tests.data import writers


def shard(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            writers.add(tar, name, data)
    return path


@pytest.fixture(scope="module")
def picture() -> bytes:
    return writers.png(writers.scenes(1)[0].load_image())


def test_text_beside_a_picture_is_its_caption(tmp_path, picture):
    path = shard(tmp_path, {"d/1.txt": b" a dot\n", "d/1.png": picture, "d/2.png": picture, "d/2.txt": b"b"})
    records = list(read_shards([path]))
    assert [(r.id, r.source, r.captions) for r in records] == [("d/1", "a", ("a dot",)), ("d/2", "a", ("b",))]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"1.txt": b"x"}, "sample 1: no picture"),
        ({"1.png": b"x"}, "sample 1: no .txt, and no caption in .json"),
        ({"1.png": b"x", "1.txt": b"\xff"}, "sample 1: .*decode"),
        ({"1.png": b"x", "1.json": b"[]"}, "sample 1: .*must be an object"),
        ({"1.png": b"x", "1.txt": b"a", "2.txt": b"b", "1.json": b"{}"}, "sample 2: no picture"),
    ],
)
def test_a_broken_sample_is_named(tmp_path, members, says):
    with pytest.raises(InputError, match=f"a.tar, {says}"):
        list(read_shards([shard(tmp_path, members)]))


def test_no_shard_is_an_error():
    with pytest.raises(InputError, match="no tar shard"):
        list(read_shards([]))


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 1), (2, 2), (3, 2), (1, 8)])
def test_ranks_and_workers_share_a_stream_without_overlap(tmp_path, world, workers):
    folder = writers.write_shards(writers.scenes(10), tmp_path, shards=5)
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    parts = [
        [record.id for record in stream_shards(shards, rank, world, worker, workers)]
        for rank in range(world)
        for worker in range(workers)
    ]
    seen = [identity for part in parts for identity in part]
    assert sorted(seen) == [f"{i:06d}" for i in range(10)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_stream_over_http_gives_what_the_files_give(tmp_path, server):
    writers.write_shards(writers.scenes(3), tmp_path, shards=1)
    streamed = list(stream_shards([f"{server}/train-0000.tar"]))
    for here, there in zip(read_shards([tmp_path / "train-0000.tar"]), streamed, strict=True):
        assert (here.id, here.source, here.captions, here.expressions, here.negatives) == (
            there.id,
            there.source,
            there.captions,
            there.expressions,
            there.negatives,
        )
        assert here.load_image().tobytes() == there.load_image().tobytes()
        assert here.load_negative_image().tobytes() == there.load_negative_image().tobytes()
    faults = Faults("skip")
    assert not list(stream_shards([f"{server}/gone.tar"], faults=faults))
    assert "404" in faults.found[0].reason


@pytest.mark.parametrize("read", [lambda a, b: read_shards([a, b]), lambda a, b: stream_shards([str(a), str(b)])])
def test_shards_of_one_name_in_two_folders_are_two(tmp_path, picture, read):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    both = [shard(tmp_path / folder, {"0000.png": picture, "0000.txt": folder.encode()}) for folder in ("a", "b")]
    assert both[0].name == both[1].name
    records = list(read(*both))
    assert [record.captions for record in records] == [("a",), ("b",)]
    assert records[0].picture != records[1].picture


def test_a_colon_in_a_name_parts_nothing(tmp_path, picture):
    members = {f"{folder}: x/1.{kind}": data for folder in "ab" for kind, data in (("png", picture), ("txt", b"a dot"))}
    path = shard(tmp_path, members)
    for records in (list(read_shards([path])), list(stream_shards([str(path)]))):
        assert [record.id for record in records] == ["a: x/1", "b: x/1"]
