"""Work shared out between the processes of a launcher: who does what, and all results on every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from dpt_t2i.backbones.loading import resolve_device

T = TypeVar("T")


def processes(device: str) -> PartialState:
    """The processes that a launcher started, joined before any loads a model: each then has its own GPU.

    Raises:
        InputError: `device` is not here.
    """
    return PartialState(cpu=resolve_device(device).type == "cpu")


def share_of(count: int, state: PartialState) -> range:
    """Positions of `count` things that are this process's to do; consecutive, so that the shares in order are all."""
    each, over = divmod(count, state.num_processes)  # accelerate's own split gave the last thing twice until 1.11
    first = state.process_index * each + min(state.process_index, over)
    return range(first, first + each + (state.process_index < over))


def gathered(rows: Sequence[T], state: PartialState) -> list[T]:
    """The rows of every process, in the order of the processes. All of them must call it."""
    return list(gather_object(list(rows))) if state.num_processes > 1 else list(rows)
