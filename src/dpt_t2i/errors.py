"""The one error that is the user's to mend. Everything else is ours."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: a missing file, an unknown key, a wrong base model, a NaN.

    The message is one line that names the thing and the mend. The command line prints it to
    stderr without a traceback and exits with code 2; code 1 means that the fault is ours.
    """


class Stopped(Exception):
    """The run was asked to end by a signal, and has left a checkpoint. The exit code is 128 + the signal's number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
