"""How a command ends early: by an error that is the user's to mend, a place that cannot be written, or a signal."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# What the system says when a place cannot be written.
UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}


class InputError(ValueError):
    """Bad input: a missing file, an unknown key, a wrong base model, a NaN.

    The message is one line that names the thing and the mend. The command line prints it to
    stderr without a traceback and exits with code 2; code 1 means that the fault is ours.
    """


class Stopped(Exception):
    """The run was asked to end by a signal, and can go on later. The exit code is 128 + the signal's number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends what is being done as Ctrl-C does."""


def signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    """The signal behind it."""
    return signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C end the work in such a way that what was begun is cleared away.

    Raises:
        Stopped: one of them came, and nothing within took it for itself.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    own = threading.current_thread() is threading.main_thread()  # Python lets no other thread set handlers
    before = signal.signal(signal.SIGTERM, interrupt) if own else None
    try:
        yield
    except KeyboardInterrupt as asked:
        number = signal_of(asked)
        raise Stopped(number, f"{number.name}: stopped; files that were finished stay") from None
    finally:
        if own:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def writing_to(output_dir: Path | None) -> Iterator[None]:
    """Within, what the system says of a place that cannot be written is bad input; a bad `output_dir` at once.

    Raises:
        InputError: no permission, no room, a file where a folder should be.
    """
    try:
        if output_dir is not None:
            _check_place(output_dir)
        yield
    except OSError as error:
        if not _is_unwritable(error, output_dir):
            raise
        raise InputError(f"cannot {_denied(error)} {error.filename or output_dir}: {error.strerror}") from error
    except Exception as error:
        # safetensors tells what the disk said in its own class of error, which is no OSError
        said = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if said is None or int(said[1]) not in UNWRITABLE:
            raise
        raise InputError(f"cannot write {output_dir or 'a file of weights'}: {os.strerror(int(said[1]))}") from error


def _check_place(output_dir: Path) -> None:
    """Fail before the work, not after it: the nearest folder that exists must be one and be ours to write in."""
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"cannot write {output_dir}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {output_dir}: no permission in {place}")


def _denied(error: OSError) -> str:
    """`read` where that is what the system refuses for this file, else `write`."""
    there = isinstance(error.filename, str) and os.path.exists(error.filename)
    return "read" if there and error.errno == errno.EACCES and not os.access(error.filename, os.R_OK) else "write"


def _is_unwritable(error: OSError, output_dir: Path | None) -> bool:
    if error.errno in UNWRITABLE:
        return True
    if error.errno != errno.ENOENT or output_dir is None or not isinstance(error.filename, str):
        return False
    # mkdir in a file system that takes no folders (/proc) answers that the new folder does not exist
    target = output_dir.absolute()
    return Path(error.filename).absolute() in (target, *target.parents)
