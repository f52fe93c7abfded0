"""From what a user calls a place of the denoiser to `Tap`s."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError

FUSION = re.compile(r"(?P<taps>.+)-(?P<channels>[1-9]\d*)-(?P<side>[1-9]\d*)")


def parse_taps(
    text: str, table: Mapping[str, Tap], inner: Callable[[str], Tap | None] | None = None
) -> tuple[Tap, ...]:
    """The taps named in `text`: names of `table` and dotted module paths, joined with `_` (`bottom0_up1`), or `all`.

    A fusion behind them (`all-40-12`, see `parse_fusion`) is the adapter's business and is left out here.

    Args:
        inner: finds the tap of a dotted path, or None where the denoiser has no such module. Paths hold underscores
            themselves, so at each place the longest text that names something is taken.

    Raises:
        InputError: a name is unknown (names the nearest) or comes twice.
    """
    fused = FUSION.fullmatch(text.strip())
    named = fused["taps"] if fused else text.strip()
    if named == "all":
        return tuple(table.values())
    parts = named.split("_")
    found: list[Tap] = []
    start = 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            tap = _lookup("_".join(parts[start:end]), table, inner)
            if tap is not None:
                found.append(tap)
                start = end
                break
        else:
            raise InputError(_unknown("_".join(parts[start:]), table))
    names = [tap.name for tap in found]
    if len(set(names)) < len(names):
        raise InputError(f"tap `{text}` names a block twice; give each once")
    return tuple(found)


def parse_fusion(text: str) -> tuple[int, int] | None:
    """(channels, side) of a fused tap such as the release's `all-1280-8`; None for taps that are simply joined.

    The maps of all named taps are projected to so many channels, brought to side x side and summed.
    """
    fused = FUSION.fullmatch(text.strip())
    return (int(fused["channels"]), int(fused["side"])) if fused else None


def pick_map(output: Any, tap: Tap) -> Tensor:
    """The map in what the module of `tap` returned."""
    return output if tap.select == "tensor" else output[0]


def tap_of_output(path: str, output: Any, latent_side: int) -> Tap:
    """The tap of module `path`, whose `output` was seen on a square latent of `latent_side` pixels.

    Raises:
        InputError: the module gives no `[B, C, h, w]` map.
    """
    is_tensor = isinstance(output, Tensor)
    value = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(value, Tensor) or value.ndim != 4:
        raise InputError(f"tap `{path}` gives no [B, C, h, w] map; name a block, a resnet or a whole attention module")
    stride = latent_side // value.shape[-1]
    return Tap(path, path, value.shape[1], stride, "tensor" if is_tensor else "first")


def _lookup(name: str, table: Mapping[str, Tap], inner: Callable[[str], Tap | None] | None) -> Tap | None:
    if name in table:
        return table[name]
    return inner(name) if inner is not None and "." in name else None


def _unknown(rest: str, table: Mapping[str, Tap]) -> str:
    """`rest` starts with the unknown name; it may be a dotted path, or end in further names."""
    name = rest if "." in rest else rest.split("_")[0]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"unknown tap `{name}`; {hint}known: {', '.join(table)}, or the dotted path of an inner module"
