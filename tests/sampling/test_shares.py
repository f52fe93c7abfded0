"""Every thing is done by exactly one process, also where there are fewer things than processes."""

from typing import Any

import pytest
from accelerate import PartialState

from dpt_t2i.sampling.shares import gathered, processes, share_of


@pytest.fixture
def world() -> Any:
    """`world(rank, processes)`: accelerate's own state, told that it is one of several."""
    state = PartialState()
    before = state.process_index, state.num_processes

    def make(rank: int, count: int) -> PartialState:
        state.process_index, state.num_processes = rank, count
        return state

    yield make
    state.process_index, state.num_processes = before


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_in_order_are_all(world: Any, count: int, size: int) -> None:
    shares = [list(share_of(count, world(rank, size))) for rank in range(size)]
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_has_everything() -> None:
    state = processes("cpu")
    assert state.is_main_process and gathered(("a", "b"), state) == ["a", "b"]
