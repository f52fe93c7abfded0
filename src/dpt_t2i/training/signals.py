"""SIGTERM and SIGINT as a request to stop after the step, for machines that are taken away at short notice."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

CAUGHT = (signal.SIGTERM, signal.SIGINT)
ONE_WISH = 3.0  # seconds in which several signals are one: a launcher sends on what its processes got themselves


class Signals:
    """Inside the block, the first signal is noted in `received` (its number, else 0).

    A later SIGINT acts at once (an impatient Ctrl-C); SIGTERM never does, whoever means it in earnest has SIGKILL.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._before = {number: signal.signal(number, self._note) for number in CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            log.warning(
                "%s: stopping after this step or validation, with a checkpoint; Ctrl-C once more, a few seconds from "
                "now, ends at once without one",
                signal.Signals(number).name,
            )
        elif number == signal.SIGINT and time.monotonic() - self._since > ONE_WISH:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
