"""From the cache or live, the same latents and states; and nothing that does not belong to what is asked for."""

import json
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from dpt_t2i.config import BaseModelConfig, CacheConfig, TrainDataConfig
from dpt_t2i.data.examples import Examples, View, collate
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.sources import open_records
from dpt_t2i.errors import InputError
from dpt_t2i.scenes.commands import export_scenes
from dpt_t2i.training import cached as module
from dpt_t2i.training.cached import CachedEncodings, open_cache, run_cache
from dpt_t2i.training.encode import Encoder
from tests.tiny import tiny_backbone

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.fixture
def folder(tmp_path):
    export_scenes(tmp_path / "scenes", n=8, seed=2, size=40)
    return tmp_path / "scenes"


@pytest.fixture
def data(folder, tmp_path):
    return TrainDataConfig(
        dataset=str(folder), resolution=32, val_samples=2, random_flip=True, cache_dir=tmp_path / "cache"
    )


@pytest.fixture
def run(backbone, monkeypatch):
    monkeypatch.setattr(module, "load_backbone", lambda *_: backbone)
    return lambda data, **more: run_cache(CacheConfig(model=BaseModelConfig(device="cpu"), data=data, **more))


def batches(data):
    examples = Examples(open_records(data, "train", 32), 32, seed=1, view=View(random_flip=data.random_flip))
    return [collate([examples[4 * number + i] for i in range(4)]) for number in range(6)]  # four epochs


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_encoded_from_the_cache_is_encoded_live(backbone, data, run, monkeypatch, dtype):
    data = data.model_copy(update={"cache_dtype": dtype})
    run(data, block_size=4)
    live = [Encoder(backbone, 20, None)(batch) for batch in batches(data)]
    encoder = Encoder(backbone, 20, None, cached=open_cache(data, backbone, 32))

    def refuse(*_):
        raise AssertionError("encoded, though it is in the cache")

    monkeypatch.setattr(backbone, "encode_text", refuse, raising=False)
    monkeypatch.setattr(backbone, "encode_image", refuse, raising=False)
    for expected, batch in zip(live, batches(data), strict=True):
        found = encoder(batch)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(found.latents, expected.latents, rtol=limit, atol=limit)
        for name in ("tokens", "pooled"):
            ours, theirs = getattr(found.text, name), getattr(expected.text, name)
            torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)
            assert ours.dtype == torch.float32
        assert torch.equal(found.text.mask, expected.text.mask)
        for name in (f.name for f in fields(found) if isinstance(getattr(found, f.name), Tensor)):
            assert getattr(found, name).shape == getattr(expected, name).shape


def test_what_is_missing_is_encoded_and_said_once(backbone, data, run, folder, caplog):
    run(data)
    (folder / "000001.png").write_bytes((folder / "000005.png").read_bytes())  # changed behind the cache's back
    (folder / "000000.png").write_bytes((folder / "negatives" / "000007.png").read_bytes())  # held out: not cached
    cached = open_cache(data, backbone, 32)
    encoder = Encoder(backbone, 20, None, cached=cached)
    for batch in batches(data):
        expected, found = Encoder(backbone, 20, None)(batch), encoder(batch)
        torch.testing.assert_close(found.latents, expected.latents, rtol=2e-3, atol=2e-3)
    assert caplog.text.count("not in the cache") == 1


def test_again_only_what_changed_is_encoded(data, run, folder):
    first = run(data, block_size=2)
    assert first["records"] == 6 and first["images_encoded"] == first["images"] > 12
    again = run(data, block_size=2)
    assert (again["images_encoded"], again["texts_encoded"]) == (0, 0)
    (folder / "000001.png").write_bytes((folder / "negatives" / "000007.png").read_bytes())
    changed = run(data, block_size=2)
    assert 0 < changed["images_encoded"] < 10 and changed["texts_encoded"] == 0
    assert run(data, block_size=3)["images_encoded"] == 0  # other blocks, the same content


def test_each_text_is_encoded_once_though_no_process_knows_of_the_others(data, run, monkeypatch):
    monkeypatch.setattr(module.Cache, "__contains__", lambda *_: False)  # as if all blocks were begun at one moment
    found = run(data, block_size=2)
    assert found["texts_encoded"] == found["texts"] > 6


def change_rows(folder, change):
    """Write what `change` makes of all rows of the export."""
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")


def show_the_one_before(rows):
    """Each record's hard negative becomes the picture of the record before it."""
    for before, row in zip(rows, rows[1:], strict=False):
        row["negative_file"] = before["file_name"]


def show_the_next(rows):
    """Each record's hard negative becomes the picture of the record after it, which that one shows around its boxes."""
    assert all(row["expressions"] for row in rows)
    for row, after in zip(rows, rows[1:], strict=False):
        row["negative_file"] = after["file_name"]


def misplace(rows):
    """A box of each of these rows lies outside its picture."""
    for row in rows:
        row["expressions"] = [{"text": "it", "spans": [[0, 2]], "boxes": [[30, 30, 40, 40]]}]


def test_each_picture_is_encoded_once_though_no_process_knows_of_the_others(data, run, folder, monkeypatch):
    change_rows(folder, show_the_one_before)
    expected = run(data.model_copy(update={"cache_dir": data.cache_dir / "one"}), block_size=100)["images"]
    monkeypatch.setattr(module.Cache, "__contains__", lambda *_: False)  # as if all blocks were begun at one moment
    found = run(data, block_size=1)
    assert found["images_encoded"] == found["images"] == expected > 12


def test_a_square_of_two_records_is_encoded_once_whatever_boxes_it_is_cut_around(data, run, folder, monkeypatch):
    """The pictures are squares, so all squares of one are the same: six and their mirrors (the last negative is
    held out)."""
    change_rows(folder, show_the_next)
    expected = run(data.model_copy(update={"cache_dir": data.cache_dir / "one"}), block_size=100)["images"]
    monkeypatch.setattr(module.Cache, "__contains__", lambda *_: False)  # as if all blocks were begun at one moment
    found = run(data, block_size=1)
    assert found["images_encoded"] == found["images"] == expected == 12


def test_a_view_shared_with_a_record_that_is_left_out_is_not_lost(backbone, data, run, folder, monkeypatch):
    change_rows(folder, show_the_one_before)
    change_rows(folder, lambda rows: misplace(rows[::2]))  # their other views are still another's hard negative
    data = data.model_copy(update={"on_bad": "skip", "random_flip": False})
    assert run(data, block_size=1)["left_out"] == 3
    examples = Examples(open_records(data, "train", 32), 32, seed=1, view=View(random_flip=False), skip_bad=True)
    monkeypatch.setattr(backbone, "encode_image", lambda *_: pytest.fail("not in the cache"), raising=False)
    Encoder(backbone, 20, None, cached=open_cache(data, backbone, 32))(collate([examples[i] for i in range(6)]))


def test_other_weights_find_nothing(backbone, data, run):
    run(data)
    other = tiny_backbone(seed=1)
    assert len(open_cache(data, backbone, 32).latents) > 0
    for cached in (
        CachedEncodings(data.cache_dir, other, 32, "float16"),
        CachedEncodings(data.cache_dir, backbone, 32, "float32"),
    ):
        assert len(cached.latents) == len(cached.text) == 0
    resized = CachedEncodings(data.cache_dir, backbone, 64, "float16")
    assert len(resized.latents) == 0 and len(resized.text) > 0  # a text has no pixels


def test_a_cache_of_other_settings_is_told_as_training_begins(backbone, data, run, caplog):
    run(data)
    open_cache(data, backbone, 32)
    assert "of this run" not in caplog.text
    open_cache(data, backbone, 64)
    told = [r.getMessage() for r in caplog.records if "of this run" in r.getMessage()]
    assert told == [f"cache_dir {data.cache_dir} has no latents of this run, but some of size 32, not 64"]
    caplog.clear()
    open_cache(data, tiny_backbone(seed=1), 32)
    assert caplog.text.count("but some of weights ") == 2, "of latents and of texts"


@pytest.mark.parametrize("change", [{"pad_token": "<|startoftext|>"}, {"padding_side": "left"}])
def test_other_padding_finds_nothing(backbone, data, run, change):
    """What stands behind a text is read too, by cross-attention."""
    run(data)
    other = tiny_backbone()
    for name, value in change.items():
        assert getattr(other.pipeline.tokenizer, name) != value
        setattr(other.pipeline.tokenizer, name, value)
    cached = CachedEncodings(data.cache_dir, other, 32, "float16")
    assert len(cached.text) == 0 and len(cached.latents) > 0
    again = tiny_backbone()
    again.pipeline.tokenizer(["a", "a star"], padding="longest", truncation=True)  # a call leaves its wishes in there
    assert len(CachedEncodings(data.cache_dir, again, 32, "float16").text) > 0


def test_the_posterior_keeps_its_noise(backbone, data, run):
    run(data.model_copy(update={"cache_dtype": "float32"}))
    cached = CachedEncodings(data.cache_dir, backbone, 32, "float32")
    image = batches(data)[0].images[:1]
    rows = cached.latents.read([module.pixels_key(image[0])])
    drawn = module.draw_latents(backbone.pipeline.vae, rows["mean"], rows["logvar"], torch.Generator().manual_seed(3))
    with torch.no_grad():
        live = backbone.encode_image(image, torch.Generator().manual_seed(3))
        mean = backbone.encode_image(image)
    torch.testing.assert_close(drawn, live, rtol=1e-4, atol=1e-5)
    assert (drawn - mean).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cache_dir": None}, "needs cache_dir"),
        ({"center_crop": False}, "random crops never come back"),
        ({"dataset": "scenes"}, "give max_samples"),
    ],
)
def test_what_cannot_be_cached_is_one_line(data, run, change, says):
    with pytest.raises(InputError, match=says):
        run(data.model_copy(update=change))


def test_a_missing_cache_is_one_line(backbone, data):
    with pytest.raises(InputError, match="dpt data cache"):
        open_cache(data, backbone, 32)
    assert open_cache(data.model_copy(update={"cache_dir": None}), backbone, 32) is None


def test_a_broken_picture_is_one_line_or_left_out_and_counted(data, run, folder, caplog):
    file = next(folder.rglob("metadata.jsonl"))
    broken = file.parent / json.loads(file.read_text().splitlines()[0])["file_name"]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError, match=broken.name):
        run(data)
    found = run(data.model_copy(update={"on_bad": "skip"}), block_size=2)
    assert found["left_out"] == 1 and "left out for a broken picture or box: 1" in found["summary"]
    assert found["images_encoded"] > 0 and caplog.text.count("left out: ") == 1 and broken.name in caplog.text


def test_what_is_broken_is_told_by_the_block_of_its_record_alone(data, folder):
    """The first block encodes all of row 1's picture, which is row 0's negative: row 1 is its guest."""
    change_rows(folder, show_the_next)
    broken = folder / json.loads((folder / "metadata.jsonl").read_text().splitlines()[1])["file_name"]
    broken.write_bytes(broken.read_bytes()[:200])
    data = data.model_copy(update={"on_bad": "skip"})
    records = open_records(data, "train", 32)
    shares, told = module._shares(records, block_size=1), []
    assert [[one.record for one in share if one.guest] for share in shares] == [[1], [2], [3], [4], [5], []]
    for share in shares:
        bad = Faults("skip")
        list(module._squares_of(records, share, data, 32, bad))
        told.append([fault.where for fault in bad.found])
    assert told == [[f"{record.source}/{record.id}"] for record in records[:2]] + [[]] * 4


def test_a_box_outside_its_picture_is_not_cached_unseen(data, run, folder):
    change_rows(folder, lambda rows: misplace(rows[:1]))
    with pytest.raises(InputError, match="outside"):
        run(data)
    assert run(data.model_copy(update={"on_bad": "skip"}))["left_out"] == 1
