import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dpt_t2i.data.examples import Examples, MicroBatches, Part, View, collate, random_negative
from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError
from tests.data import writers


def flat(color: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (color, color, color))


def record(index: int, **fields) -> Record:
    return Record(id=str(index), source="toy", image=lambda: flat(10 * index), captions=(f"picture {index}",), **fields)


def test_random_negative_is_never_the_own_image_or_caption():
    records = [record(i) for i in range(4)]
    examples = Examples(records, 8)
    for epoch in range(20):
        for row in range(4):
            item = examples.item(epoch, row)
            assert item.random_caption != item.caption
            assert not torch.equal(item.random_pixels, item.pixels)


def test_last_record_can_be_drawn():
    examples = Examples([record(i) for i in range(3)], 8)
    drawn = {examples.item(epoch, 0).random_caption for epoch in range(30)}
    assert drawn == {"picture 1", "picture 2"}


def test_an_epoch_shows_every_record_once_in_its_own_order():
    examples = Examples(SceneRecords(length=6), 64)
    epochs = [[examples[6 * e + k].record for k in range(6)] for e in range(3)]
    assert all(sorted(rows) == list(range(6)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) > 1


EPOCH, STEPS = 20, 6  # of batches of eight: two epochs and more


def shown(world: int, workers: int) -> dict[str, list]:
    """Field of the batches -> what it is of each example, in the order of all processes' examples."""
    records = [*SceneRecords(length=EPOCH - 1), record(99)]  # the last has no negative and no expression
    view = View(center_crop=False, random_flip=True)
    examples = Examples([*map(widened, records)], 48, seed=3, view=view)
    ranks = [examples.loader(Part(8 // world, 1, rank, world, 0, STEPS), workers) for rank in range(world)]
    batches = [batch for step in zip(*ranks, strict=True) for batch in step]
    names = [f.name for f in fields(batches[0]) if f.name != "skipped"]
    return {name: [value for batch in batches for value in getattr(batch, name)] for name in names}


def widened(shown: Record) -> Record:
    """The record with pictures twice as wide as high, so that a crop has a choice."""

    def wide(load: Callable[[], Image.Image]) -> Callable[[], Image.Image]:
        return lambda: ImageOps.pad(load(), (128, 64), centering=(0, 0))

    negative = shown.negative_image and wide(shown.negative_image)
    return replace(shown, image=wide(shown.image), negative_image=negative)


@pytest.fixture(scope="module")
def alone() -> dict[str, list]:
    return shown(1, 0)


def test_crops_and_flips_are_among_what_is_compared(alone):
    assert len(alone["captions"]) == 8 * STEPS and len(set(alone["records"][:EPOCH])) == EPOCH
    assert {True, False} == {bool(there) for there in alone["has_hard_image"]}
    row = alone["records"][0]
    first, again = (alone["images"][place] for place in (0, alone["records"].index(row, 1)))
    assert not torch.equal(first, again), "each epoch draws anew"


@pytest.mark.parametrize(("world", "workers"), [(1, 8), (4, 0), (4, 8)])
def test_same_examples_on_one_process_or_four_with_or_without_workers(alone, world, workers):
    found = shown(world, workers)
    assert found.keys() == alone.keys()
    for name, values in found.items():
        assert len(values) == len(alone[name])
        for mine, theirs in zip(values, alone[name], strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, name


def test_resuming_goes_on_where_it_was():
    whole = list(MicroBatches(Part(2, 3, steps=5)))
    assert list(MicroBatches(Part(2, 3, first_step=2, steps=5))) == whole[2 * 3 :]
    assert len(MicroBatches(Part(2, 3, first_step=2, steps=5))) == 9


def test_what_a_source_lacks_is_masked():
    full = record(
        0,
        expressions=(Expression("the dot", ((4, 7),), ((0.0, 0.0, 4.0, 8.0),)),),
        negatives=(Negative("no dot", "toy"),),
        negative_image=lambda: flat(255),
    )
    examples = Examples([full, record(1)], 8)
    batch = collate([examples.item(0, 0), examples.item(0, 1)])
    assert batch.has_hard_caption.tolist() == batch.has_hard_image.tolist() == [True, False]
    assert batch.hard_captions == ("no dot", "")
    assert batch.num_boxes() == 1
    assert batch.boxes[0].tolist() == [[0.25, 0.5, 0.5, 1.0]]
    assert batch.spans == (((4, 7),), ())
    assert batch.hard_images[0].min() == 1.0
    assert batch.hard_images[1].abs().max() == 0


def test_alone_is_the_same_picture_and_caption_and_opens_no_other():
    records = SceneRecords(length=6)
    paired, alone = Examples(records, 64), Examples(records, 64, view=View(alone=True))
    for epoch, row in ((0, 0), (3, 5)):
        item, among = alone.item(epoch, row), paired.item(epoch, row)
        assert torch.equal(item.pixels, among.pixels) and item.caption == among.caption
        assert item.hard_pixels is item.random_pixels is item.hard_caption is item.expression is None

    def refuse() -> Image.Image:
        raise AssertionError("a negative was opened")

    shown = Record(id="0", source="toy", image=lambda: flat(7), captions=("seven",), negative_image=refuse)
    other = Record(id="1", source="toy", image=refuse, captions=("one",))
    batch = collate([Examples([shown, other], 8, view=View(alone=True)).item(0, 0)])
    assert not batch.has_hard_image.any() and not batch.has_random_image.any() and not batch.has_hard_caption.any()
    assert collate([paired.item(0, 0)]).has_random_image.all()


def test_one_record_is_too_few():
    with pytest.raises(InputError, match="two records are needed.*the data set has 1"):
        Examples([record(0)], 8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_loaders_process_outlives_one_wish_to_stop(number):
    """Who takes a machine away signals them all, and the training still wants to end its step."""
    examples = Examples(SceneRecords(length=6), 16)
    stream = iter(examples.loader(Part(2, steps=9), 1))
    first, (worker,) = next(stream), multiprocessing.active_children()
    for _ in range(2):  # itself, and by way of the launcher
        os.kill(worker.pid, number)
        time.sleep(0.1)
    rest = list(stream)
    alone = list(examples.loader(Part(2, steps=9), 0))
    assert [batch.captions for batch in (first, *rest)] == [batch.captions for batch in alone]
    worker.join(20)
    assert worker.exitcode == 0, "it ends with its loader"
    stream = iter(examples.loader(Part(2, steps=999), 1))
    next(stream)
    (worker,) = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="killed by signal"):  # PyTorch raises it wherever the second one finds us
        for _ in range(20):
            os.kill(worker.pid, number)
            time.sleep(0.3)


def test_a_run_that_fails_does_not_wait_for_its_loaders_process_for_good():
    code = (
        "from dpt_t2i.data.examples import Examples, Part\n"
        "from dpt_t2i.data.scenes import SceneRecords\n"
        "stream = iter(Examples(SceneRecords(length=6), 16).loader(Part(2, steps=999), 1))\n"
        "next(stream)\nraise SystemExit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr


def test_scene_boxes_enclose_the_named_thing():
    records = SceneRecords(length=50, size=64)
    single = next(r for r in records if "single" not in r.id and len(r.expressions[0].boxes) == 1)
    x, y, w, h = single.expressions[0].boxes[0]
    image = np.asarray(single.load_image(), dtype=float)
    ground = np.median(image.reshape(-1, 3), axis=0)
    centre = image[int(y + h / 2), int(x + w / 2)]
    assert np.abs(centre - ground).max() > 40


def test_a_random_negative_is_no_other_caption_of_the_record():
    image = writers.scenes(1)[0].image
    two = [
        Record("0", "toy", image, ("a cup", "a red cup"), image_id="0"),
        Record("1", "toy", image, ("a red cup", "a dog"), image_id="1"),
        Record("2", "toy", image, ("a cat",), image_id="2"),
    ]
    drawn = [
        random_negative(two, 0, caption, np.random.default_rng(n)) for n in range(50) for caption in two[0].captions
    ]
    assert {text for _, text in drawn} == {"a dog", "a cat"}
    # "a red cup" is one of record 1's own, so its picture is no negative of that caption
    with_it = [random_negative(two, 0, "a red cup", np.random.default_rng(n))[0].id for n in range(50)]
    assert set(with_it) == {"2"}


def test_a_random_negative_of_a_scene_is_false_both_ways():
    scenes = SceneRecords("train", 300, 64, seed=3)
    drawn = [(scenes[row], random_negative(scenes, row, "", np.random.default_rng(row))[0]) for row in range(300)]
    assert not any(one.also_true(other) or other.also_true(one) for one, other in drawn)
    blind = [(scenes[row], scenes[(row + 7) % 300]) for row in range(300)]
    assert sum(one.also_true(other) for one, other in blind) > 5  # it is often true where nobody looks
    assert all(scene.also_true(scene) for scene in scenes[:50])


def test_a_hard_picture_stands_beside_the_first_caption_alone_which_is_false_of_it():
    image = writers.scenes(1)[0].image
    pair = Record("0", "toy", image, ("a red cup", "a cup"), (), (Negative("a blue cup", "x"),), image, image_id="0")
    other = Record("1", "toy", image, ("a dog",), image_id="1")
    items = [Examples([pair, other], 64).item(epoch, 0) for epoch in range(60)]
    assert {(item.caption, item.hard_pixels is not None, item.hard_pair) for item in items} == {
        ("a red cup", True, True),
        ("a cup", False, False),
    }
    assert 30 < sum(item.hard_pair for item in items) < 58  # three of four, of one caption in two one of two
    alone = [Examples([pair, other], 64, view=View(alone=True)).item(epoch, 0).caption for epoch in range(60)]
    assert alone == [item.caption for item in items]
