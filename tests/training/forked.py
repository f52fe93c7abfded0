"""Training in processes of their own that need no start: forks of the test's, which has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

CONTEXT = multiprocessing.get_context("fork")


def start(work: Callable[[], object], log: Path, rank: int = 0, world: int = 1, port: int = 0) -> ForkProcess:
    """Run `work` in a fork, as process `rank` of `world`, whose words go to `log`. Exit code 1 = it raised."""

    def body() -> None:
        with log.open("a") as words:
            os.dup2(words.fileno(), 2)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(1)
        if world > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    process = CONTEXT.Process(target=body)
    process.start()
    return process


def run(work: Callable[[], object], folder: Path, world: int = 1) -> None:
    """`work` on `world` processes that talk through gloo; waits for all and passes a failure on."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank-{rank}.log" for rank in range(world)]
    port = _free_port()
    processes = [start(work, log, rank, world, port) for rank, log in enumerate(logs)]
    for process, log in zip(processes, logs, strict=True):
        process.join(600)
        assert process.exitcode == 0, f"exit code {process.exitcode}: {log.read_text()[-3000:]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
