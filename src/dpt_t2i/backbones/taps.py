"""From what a user calls a place of the denoiser to `Tap`s."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from dpt_t2i.backbones.types import Tap
from dpt_t2i.errors import InputError

SELECTS: tuple[Literal["first", "second"], ...] = ("first", "second")  # places in a tuple, as `Tap.select` names them
FUSION = re.compile(r"(?P<taps>.+)-(?P<channels>[1-9]\d*)-(?P<side>[1-9]\d*)")


def parse_taps(
    text: str,
    table: Mapping[str, Tap],
    inner: Callable[[str], Tap | None] | None = None,
    modules: Iterable[str] = (),
) -> tuple[Tap, ...]:
    """The taps named in `text`: names of `table` and dotted module paths, joined with `_` (`bottom0_up1`), or `all`.

    A fusion behind them (`all-40-12`, see `parse_fusion`) is the adapter's business and is left out here.

    Args:
        inner: finds the tap of a dotted path, or None where the denoiser has no such module. Paths hold underscores
            themselves, so at each place the longest text that names something is taken.
        modules: paths of all inner modules, among which the nearest to a wrong path is looked for.

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
            raise InputError(_unknown("_".join(parts[start:]), table, modules))
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


def pick_map(output: Any, tap: Tap, sides: tuple[int, int] | None = None) -> Tensor:
    """The map `[B, C, h, w]` in what the module of `tap` returned, contiguous: with channels last and no gradient to it
    a GroupNorm behind it crashes in its backward on the CPU (torch 2.13).

    Args:
        sides: (height, width) of the latents; needed where the module returns tokens `[B, h * w, C]`.
    """
    value: Tensor = output if tap.select == "tensor" else output[SELECTS.index(tap.select)]
    if value.ndim == 4:
        return value.contiguous()
    if sides is None:
        raise ValueError(f"tap `{tap.name}` gives tokens: say the latents' sides")
    # A U-Net rounds up where it halves; patches divide.
    rows, columns = (-(-side // tap.stride) for side in sides)
    return value.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).contiguous()


def detach_map(output: Any, tap: Tap) -> Any:
    """What the module of `tap` returned, its map without a graph; what else it returned keeps its own."""
    if tap.select == "tensor":
        return output.detach()
    place = SELECTS.index(tap.select)
    return (*output[:place], output[place].detach(), *output[place + 1 :])


def tap_of_output(path: str, output: Any, sides: tuple[int, int]) -> Tap:
    """The tap of module `path`, whose `output` was seen on latents of `sides` (height, width).

    Raises:
        InputError: the module gives neither a map nor one token a place of the image.
    """
    found: list[tuple[Literal["tensor", "first", "second"], Any]] = [("tensor", output)]
    if isinstance(output, tuple):
        found = list(zip(SELECTS, output, strict=False))
    for select, value in found:
        stride = _stride(value, sides)
        if stride is not None:
            channels = value.shape[1] if value.ndim == 4 else value.shape[2]
            return Tap(path, path, channels, stride, select)
    raise InputError(f"tap `{path}` gives no map of the image; name a block, a resnet or a whole attention module")


def _stride(value: Any, sides: tuple[int, int]) -> int | None:
    """Latent pixels per place of `value`, a map or tokens; None if it is neither."""
    height, width = sides
    if not isinstance(value, Tensor) or value.ndim not in (3, 4):
        return None
    if value.ndim == 4:
        stride = height // value.shape[2]
        return stride if (height, width) == (stride * value.shape[2], stride * value.shape[3]) else None
    stride = math.isqrt(height * width // max(value.shape[1], 1))
    fits = stride > 0 and height % stride == 0 == width % stride
    return stride if fits and value.shape[1] == (height // stride) * (width // stride) else None


def _lookup(name: str, table: Mapping[str, Tap], inner: Callable[[str], Tap | None] | None) -> Tap | None:
    if name in table:
        return table[name]
    return inner(name) if inner is not None and "." in name else None


def _unknown(rest: str, table: Mapping[str, Tap], modules: Iterable[str]) -> str:
    """`rest` starts with the unknown name; it may be a dotted path, or end in further names."""
    name = rest if "." in rest else rest.split("_")[0]
    near = difflib.get_close_matches(name, list(modules) if "." in name else table, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"unknown tap `{name}`; {hint}known: {', '.join(table)}, or the dotted path of an inner module"
