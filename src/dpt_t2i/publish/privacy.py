"""What may stand in a published file: names, but no folder of the machine where it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_ROOTED = re.compile(r"[/~\\.]|[A-Za-z]:[/\\]")


def public(value: Any) -> Any:
    """`value` (plain JSON) with every path cut to its last part; hub ids (`owner/name`) and URLs stay."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str) or "://" in value:
        return value
    if _ROOTED.match(value) or "\\" in value or value.count("/") > 1:
        return (PureWindowsPath(value) if "\\" in value else PurePosixPath(value)).name
    return value
