"""One run a folder: a sweep started twice, or a job that a scheduler starts again too early, must not mix with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpt_t2i.errors import InputError

LOCK = ".lock"

log = logging.getLogger(__name__)


@contextmanager
def occupied(folder: Path | None) -> Iterator[None]:
    """Within, `folder` is this process's; None = another process of the run sees to it.

    The system lets go of the lock when the process ends, however it ends. Where there are no locks (Windows, some
    network disks) nothing is checked.

    Raises:
        InputError: another run is at work in the folder.
    """
    if folder is None:
        yield
        return
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process's own: its loader processes do not hold it
        except (BlockingIOError, PermissionError):  # held by another: systems differ in what they call it
            raise InputError(
                f"another run is at work in {folder}; wait for its end, or give another --output_dir or --run_name"
            ) from None
        except OSError as error:
            log.info("%s cannot be locked (%s): see to it that no other run uses it", folder, error)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
