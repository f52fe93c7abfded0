"""The cache: found by content, whole after a kill, and no block done twice."""

import json
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import replace

import pytest
import torch

from dpt_t2i.data.cache import Cache, Spec, content_key, fill, pixels_key, record_key, text_key
from dpt_t2i.data.shards import read_shards
from dpt_t2i.data.transforms import to_pixels
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.example import make_example
from dpt_t2i.scenes.render import render
from tests.data import writers

SPEC = Spec("latents", "bundled", "abc", 64, "float32", "float32")
FORK = multiprocessing.get_context("fork")
BLOCKS = [content_key(bytes([number])).hex() for number in range(6)]


def rows_of(number, count=3):
    """Keys and columns of a block, which say what they are."""
    values = torch.arange(count) + 10.0 * number
    return [text_key(f"{number} {row}") for row in range(count)], {"value": values[:, None].repeat(1, 4)}


def work(root, log, seconds, blocks=BLOCKS):
    """A process that fills; every block that it begins and ends is a line of `log`."""
    cache = Cache(root, SPEC)

    def encode(number, beat):
        with log.open("a") as file:
            file.write(f"begin {number}\n")
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(f"end {number}\n")
        return (*rows_of(number), 0)

    fill(cache, blocks, encode, stale_after=60)


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def check_whole(root):
    cache = Cache(root, SPEC)
    assert len(cache) == 3 * len(BLOCKS)
    for number in range(len(BLOCKS)):
        keys, columns = rows_of(number)
        assert torch.equal(cache.read(keys)["value"], columns["value"])
    assert not list(cache.folder.glob("*.claim.*")) and not list(cache.folder.glob("*.partial"))


def test_rows_come_back_in_the_order_of_the_keys(tmp_path):
    cache = Cache(tmp_path, replace(SPEC, dtype="float16"))
    for number in range(2):
        cache.write(BLOCKS[number], *rows_of(number))
    keys = [text_key("1 2"), text_key("0 1"), text_key("1 2")]
    found = Cache(tmp_path, replace(SPEC, dtype="float16")).read(keys)["value"]
    assert found.dtype == torch.float16 and found[:, 0].tolist() == [12, 1, 12]
    assert text_key("2 0") not in cache and len(cache) == 6


@pytest.mark.parametrize(
    "change", [{"kind": "text"}, {"weights": "abd"}, {"size": 65}, {"compute_dtype": "bfloat16"}, {"dtype": "float16"}]
)
def test_another_spec_finds_nothing(tmp_path, change):
    Cache(tmp_path, SPEC).write(BLOCKS[0], *rows_of(0))
    assert len(Cache(tmp_path, replace(SPEC, **change))) == 0
    assert len(Cache(tmp_path, replace(SPEC, model="a moved folder"))) == 3


def test_what_the_dtype_cannot_hold_is_refused(tmp_path):
    cache = Cache(tmp_path, replace(SPEC, dtype="float16"))
    with pytest.raises(InputError, match="beyond float16"):
        cache.write(BLOCKS[0], [text_key("x")], {"value": torch.tensor([[70000.0]])})
    assert not cache.has(BLOCKS[0])


def test_a_record_key_follows_the_shard(tmp_path):
    def first():
        return record_key(next(read_shards([tmp_path / "train-0000.tar"])))

    writers.write_shards(writers.scenes(2), tmp_path, shards=1)
    before = first()
    assert first() == before
    os.utime(tmp_path / "train-0000.tar", ns=(1, 1))
    assert first() != before


def test_a_key_is_of_the_content():
    picture = to_pixels(render(make_example(0).scene, 32))
    other = picture.clone()
    other[0, 3, 5] += 1 / 127.5
    assert pixels_key(picture) == pixels_key(picture.clone()) != pixels_key(other)
    assert pixels_key(torch.zeros(3, 4, 8)) != pixels_key(torch.zeros(3, 8, 4))
    assert content_key(b"ab", b"c") != content_key(b"a", b"bc")


def test_a_block_that_is_done_is_not_done_again(tmp_path):
    log = tmp_path / "log"
    work(tmp_path, log, 0, BLOCKS[:2])
    work(tmp_path, log, 0)
    assert [line for line in lines(log) if line.startswith("begin")] == [f"begin {n}" for n in range(6)]
    check_whole(tmp_path)


def test_two_processes_do_each_block_once(tmp_path):
    log = tmp_path / "log"
    both = [FORK.Process(target=work, args=(tmp_path, log, 0.1)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(line for line in lines(log) if line.startswith("begin")) == [f"begin {n}" for n in range(6)]
    check_whole(tmp_path)


def test_a_killed_process_leaves_the_cache_whole_and_another_goes_on(tmp_path):
    log = tmp_path / "log"
    first = FORK.Process(target=work, args=(tmp_path, log, 0.3))
    first.start()
    until = time.time() + 60
    while "begin 2" not in lines(log) and time.time() < until:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert list(Cache(tmp_path, SPEC).folder.glob(f"{BLOCKS[2]}.claim.0"))  # it died with the block in its hands
    assert len(Cache(tmp_path, SPEC)) == 6
    work(tmp_path, log, 0)
    begun = [line for line in lines(log) if line.startswith("begin")]
    assert begun == ["begin 0", "begin 1", "begin 2", "begin 2", "begin 3", "begin 4", "begin 5"]
    check_whole(tmp_path)


def test_a_process_killed_while_it_writes_leaves_no_shard(tmp_path, monkeypatch):
    def die(path, tensors):
        path.write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("dpt_t2i.data.cache.save_file", lambda tensors, path: die(path, tensors))
    first = FORK.Process(target=work, args=(tmp_path, tmp_path / "log", 0))
    first.start()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    monkeypatch.undo()
    assert list(Cache(tmp_path, SPEC).folder.glob("*.partial")) and len(Cache(tmp_path, SPEC)) == 0
    work(tmp_path, tmp_path / "log", 0)
    check_whole(tmp_path)


@pytest.mark.parametrize(("age", "taken"), [(0, False), (1000, True)])
def test_a_claim_of_another_host_is_taken_over_when_it_is_old(tmp_path, age, taken):
    cache = Cache(tmp_path, SPEC)
    cache.folder.mkdir()
    claim = cache.folder / f"{BLOCKS[0]}.claim.4"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(claim, (time.time() - age,) * 2)
    other = FORK.Process(target=work, args=(tmp_path, tmp_path / "log", 0, BLOCKS[:1]))
    other.start()
    other.join(5 if taken else 1.5)
    assert (len(Cache(tmp_path, SPEC)) == 3) == taken
    other.kill()
    other.join()


def test_a_living_process_keeps_its_claim_and_a_reused_number_does_not(tmp_path):
    from dpt_t2i.data.cache import _is_stale

    claim = tmp_path / "x.claim.0"
    claim.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    assert not _is_stale(claim, 60)
    os.utime(claim, (1e9, 1e9))  # before this process began, so it was another's
    assert _is_stale(claim, 1e12)
    claim.write_text("")  # just being written
    assert not _is_stale(claim, 60)


def test_an_error_gives_the_block_back(tmp_path):
    def fail(number, beat):
        raise ValueError("no such picture")

    with pytest.raises(ValueError, match="no such picture"):
        fill(Cache(tmp_path, SPEC), BLOCKS, fail)
    work(tmp_path, tmp_path / "log", 0)
    check_whole(tmp_path)


def test_a_broken_shard_is_said_and_done_again(tmp_path, caplog):
    work(tmp_path, tmp_path / "log", 0)
    shard = Cache(tmp_path, SPEC).folder / f"{BLOCKS[3]}.safetensors"
    shard.unlink()
    shard.write_bytes(b"\x00" * 40)
    cache = Cache(tmp_path, SPEC)
    assert len(cache) == 15 and "cannot be read" in caplog.text and rows_of(3)[0][0] not in cache
    work(tmp_path, tmp_path / "log", 0)
    check_whole(tmp_path)
