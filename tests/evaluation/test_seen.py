"""Records that an adapter was trained on are not held out, and that is said."""

import pytest

from dpt_t2i.adapter.types import AdapterOrigin
from dpt_t2i.config import DataConfig
from dpt_t2i.evaluation.seen import seen_warnings
from dpt_t2i.scenes.commands import export_scenes


def trained(dataset: str, val_samples: int) -> AdapterOrigin:
    return AdapterOrigin({}, {"config": {"data": {"dataset": dataset, "val_samples": val_samples}}})


@pytest.fixture
def folder(tmp_path):
    export_scenes(tmp_path / "mine", n=4)
    return tmp_path / "mine"


def test_a_longer_tail_reaches_into_the_training_records(folder):
    more = DataConfig(dataset=str(folder), val_samples=10)
    (line,) = seen_warnings(more, trained("mine", 4))  # an adapter keeps the name, not the path
    assert "6 of these 10 held-out records are none" in line and "--val_samples 4" in line
    assert not seen_warnings(more, trained("mine", 10)) and not seen_warnings(more, trained("others", 4))
    assert not seen_warnings(more, None) and not seen_warnings(more, AdapterOrigin({}, {}))


def test_a_held_out_part_of_its_own_was_never_trained_on(folder):
    (folder / "val").mkdir()
    assert not seen_warnings(DataConfig(dataset=str(folder), val_samples=10), trained("mine", 4))
    assert not seen_warnings(DataConfig(val_samples=10), trained("scenes", 4))
