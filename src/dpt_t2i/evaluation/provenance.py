"""Where a number comes from."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpt_t2i.files import write_text

STACK = ("dpt-t2i", "torch", "diffusers", "transformers", "peft")


def versions() -> dict[str, str]:
    """Of the packages that decide a number."""
    return {name: _version(name) for name in STACK}


def command_line() -> str:
    """The command that is running, ready to be pasted."""
    program = Path(sys.argv[0]).name
    return shlex.join(["dpt" if program == "__main__.py" else program, *sys.argv[1:]])


def write_json(path: Path, value: Any) -> None:
    """Write in one move, folders made as needed."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, written in one move."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
