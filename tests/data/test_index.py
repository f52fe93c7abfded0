"""Packed records are the records, in a block of bytes."""

import pickle
import tracemalloc
from pathlib import Path

import pytest

from dpt_t2i.data.index import RecordIndex, Selection
from dpt_t2i.data.records import Expression, Negative, Record
from dpt_t2i.data.shards import TarImage

FULL = Record(
    "7",
    "toy",
    Path("/a/b.png"),
    ("a dot", "ein grüner Kreis"),
    (Expression("the dots", ((4, 8), (4, 8)), ((0.5, 1.0, 2.25, 3.0), (4.0, 5.0, 6.0, 7.0))),),
    (Negative("no dot", "toy"),),
    TarImage("/a/s.tar", 512, 9, "x.png"),
    "21",
    (Path("/a/c.png"), Path("/a/d.png")),
)
PLAIN = Record("8", "toy", Path("/a/e.png"), ("x",), paired=False)


def test_what_goes_in_comes_out() -> None:
    index = RecordIndex([FULL, PLAIN, FULL])
    assert list(index) == [FULL, PLAIN, FULL] and index[-2] == PLAIN and len(index) == 3
    with pytest.raises(IndexError):
        index[3]


@pytest.mark.parametrize("protocol", [pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
def test_a_loader_process_gets_the_same_records(protocol: int) -> None:
    index = pickle.loads(pickle.dumps(RecordIndex([FULL, PLAIN]), protocol))
    assert list(index) == [FULL, PLAIN] and index.nbytes == RecordIndex([FULL, PLAIN]).nbytes


def test_slices_and_selections_are_views() -> None:
    index = RecordIndex([Record(str(i), "toy", Path("x"), ("x",)) for i in range(6)])

    def ids(records) -> str:
        return "".join(record.id for record in records)

    assert (ids(index[1:4]), ids(index[:-2]), ids(index[-2:]), ids(index[::-1])) == ("123", "0123", "45", "543210")
    assert ids(index[1:5][1:]) == "234" and index[1:4][-1].id == "3"
    assert ids(Selection(index, [5, 0, 3])[1:]) == "03"


def test_a_record_of_coco_takes_less_than_a_kilobyte() -> None:
    captions = tuple(f"a man in a red shirt rides brown horse {n} down the road" for n in range(5))  # COCO: 52 letters
    name = Path("/data/coco/train2017/000000000009.jpg")
    things = tuple(Expression("the horse", ((4, 9),), ((1.5 + n, 2.5, 3.5, 4.5 + n),)) for n in range(7))
    count = 10_000
    tracemalloc.start()
    index = RecordIndex(Record(str(i), "coco", name, captions, things, image_id=str(i)) for i in range(count))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.nbytes / count < 1000 and peak / count < 1000, "nor while they are packed"
