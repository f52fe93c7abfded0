"""Where a number comes from."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from dpt_t2i.files import write_text
from dpt_t2i.versions import told

log = logging.getLogger(__name__)

STACK = ("dpt-t2i", "torch", "diffusers", "transformers", "peft")


def versions() -> dict[str, str]:
    """Of the packages that decide a number."""
    return told(*STACK)


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


def set_aside(settings: Mapping[str, Any], *files: Path) -> None:
    """Keep an earlier result of other settings: its files get a number, `itm.json` becomes `itm.1.json`.

    Args:
        settings: of the result that is about to be written, as it will stand under `settings`.
        files: of a result, all in one folder; the first is the JSON file that holds the settings.
    """
    if not files[0].is_file() or _settings_in(files[0], settings) == _comparable(settings):
        return
    number = next(n for n in count(1) if not any(_numbered(file, n).exists() for file in files))
    for file in files:
        if file.exists():
            os.replace(file, _numbered(file, number))
    log.info("%s held a result of other settings, which is now %s", files[0], _numbered(files[0], number).name)


def _settings_in(file: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a result says of the `settings` named; None where it cannot be read."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["settings"]
        return _comparable({name: told.get(name) for name in settings})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "output_dir"}


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"{file.stem}.{number}{file.suffix}")
