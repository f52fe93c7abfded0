"""Aspect-ratio buckets: each step shows one shape, each epoch every record, and a shape fits its picture."""

from collections import Counter

import pytest
from PIL import Image

from dpt_t2i.data.buckets import Buckets, bucket_shapes, sort_into_buckets
from dpt_t2i.data.examples import Examples, Part
from dpt_t2i.data.records import Record
from dpt_t2i.errors import InputError

WIDE, HIGH, SQUARE = (80, 48), (48, 80), (64, 64)


def record(number: int, size: tuple[int, int]) -> Record:
    return Record(str(number), "toy", lambda: Image.new("RGB", size, (number,) * 3), (f"picture {number}",))


def test_shapes_have_about_the_same_area():
    shapes = bucket_shapes(512)
    assert shapes[0] == (512, 512) and (704, 384) in shapes and (384, 704) in shapes
    assert all(w % 64 == 0 == h % 64 and 0.9 < w * h / 512**2 < 1.1 for w, h in shapes)


def test_an_epoch_is_made_of_whole_steps_of_one_shape_and_shows_all():
    buckets = Buckets([WIDE] * 5 + [SQUARE] * 4 + [HIGH], step=4)
    assert len(buckets) == 8 + 4 + 4 and buckets.counts() == {HIGH: 1, SQUARE: 4, WIDE: 5}
    epochs = [[buckets.row(7, epoch, place) for place in range(16)] for epoch in range(3)]
    for rows in epochs:
        assert all(len({buckets.size(row) for row in rows[at : at + 4]}) == 1 for at in range(0, 16, 4))
        shown = Counter(rows)
        assert set(shown) == set(range(10)) and shown[9] == 4, "the only high picture fills its step"
        assert sorted(shown[row] for row in range(5)) == [1, 1, 2, 2, 2]
    assert epochs[0] != epochs[1]
    assert epochs[0] == [buckets.row(7, 0, place) for place in range(16)]


def test_batches_have_the_shape_of_their_pictures_on_any_number_of_processes():
    records = [record(number, (200, 100) if number % 2 else (100, 200)) for number in range(8)]
    examples = Examples(records, 64, buckets=sort_into_buckets(records, 64, step=4))
    alone = list(examples.loader(Part(4, steps=3), 0))
    assert {tuple(batch.images.shape) for batch in alone} == {(4, 3, 88, 48), (4, 3, 48, 88)}
    for batch in alone:
        assert batch.random_images.shape == batch.hard_images.shape == batch.images.shape
    two = [list(examples.loader(Part(2, rank=rank, world=2, steps=3), 0)) for rank in (0, 1)]
    assert [first.records + second.records for first, second in zip(*two, strict=True)] == [b.records for b in alone]


def test_a_picture_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"x")
    Image.new("L", (128, 64)).save(tmp_path / "wide.png")
    records = [Record(name, "toy", tmp_path / f"{name}.png", (name,)) for name in ("wide", "broken")] + [
        record(3, (64, 128))
    ]
    with pytest.raises(InputError, match="cannot read image .*broken.png"):
        sort_into_buckets(records, 64, step=1)
    buckets = sort_into_buckets(records, 64, step=1, skip_bad=True)
    assert [buckets.size(row) for row in range(3)] == [(88, 48), (64, 64), (48, 88)]
    shown = Examples(records, 64, skip_bad=True, buckets=buckets).item(0, 1)
    assert shown.caption == "picture 3" and shown.pixels.shape == (3, 64, 64), "in the shape of its step"
