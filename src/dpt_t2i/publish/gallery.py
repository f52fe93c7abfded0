"""Images of the arms side by side, with the checker's verdict and the adapter's boxes, ready for a template."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

LARGEST = 256  # pixels of an embedded image's longer side
COLORS = 6  # colours of phrases in the style sheet


@dataclass(frozen=True)
class Overlay:
    """A box of the adapter, in pixels of the picture."""

    left: float
    top: float
    width: float
    height: float
    color: int  # 1..COLORS
    label: str


@dataclass(frozen=True)
class Shot:
    """One image of one arm."""

    uri: str  # data: URI of a PNG
    width: int
    height: int
    correct: bool
    failures: tuple[str, ...]  # facts of the prompt that do not hold
    extra_objects: int
    score: float | None
    boxes: tuple[Overlay, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A run of the prompt's text; `color` is that of the boxes that show it, 0 = none."""

    text: str
    color: int = 0


@dataclass(frozen=True)
class Line:
    """One prompt and seed: a row of the page."""

    prompt: str
    pieces: tuple[Piece, ...]
    category: str
    seed: int
    shots: Mapping[str, Shot | None]  # arm -> its image, None if it is not there


@dataclass(frozen=True)
class ArmFolder:
    """What the evaluation left in `arms/ARM`; empty if there is no such folder."""

    path: Path
    verdicts: Mapping[tuple[int, int], Mapping[str, Any]] = field(default_factory=dict)  # (prompt index, seed) -> row
    phrases: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # file -> phrases with boxes

    @staticmethod
    def read(path: Path) -> ArmFolder:
        verdicts = {(row["prompt_index"], row["seed"]): row for row in read_rows(path / "verdicts.jsonl")}
        phrases = {row["file"]: row["phrases"] for row in read_rows(path / "boxes.jsonl")}
        return ArmFolder(path, verdicts, phrases)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines; [] if there is no file, and a last line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def line_of(arms: Mapping[str, ArmFolder], prompt_index: int, seed: int) -> Line | None:
    """The images of all arms for one prompt and seed; None if no arm has one."""
    rows = {name: arm.verdicts.get((prompt_index, seed)) for name, arm in arms.items()}
    known = [row for row in rows.values() if row is not None]
    if not known:
        return None
    phrases = [p for name, row in rows.items() if row is not None for p in arms[name].phrases.get(row["file"], ())]
    colors = {span: number % COLORS + 1 for number, span in enumerate(sorted({tuple(p["span"]) for p in phrases}))}
    return Line(
        prompt=known[0]["prompt"],
        pieces=_pieces(known[0]["prompt"], colors),
        category=known[0]["category"],
        seed=seed,
        shots={name: None if row is None else _shot(arms[name], row, colors) for name, row in rows.items()},
    )


def data_uri(image: Image.Image) -> str:
    """A PNG inside a URI: no text chunks, and no larger than a report needs."""
    image = image.convert("RGB")
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _shot(arm: ArmFolder, row: Mapping[str, Any], colors: Mapping[tuple[int, ...], int]) -> Shot | None:
    file = arm.path / row["file"]
    if not file.is_file():
        return None
    with Image.open(file) as image:
        uri, (width, height) = data_uri(image), image.size
    boxes = tuple(_overlay(phrase, colors) for phrase in arm.phrases.get(row["file"], ()))
    failures = tuple(fact["text"] for fact in row["facts"] if not fact["holds"])
    return Shot(uri, width, height, row["correct"], failures, row["extra_objects"], row["score"], boxes)


def _overlay(phrase: Mapping[str, Any], colors: Mapping[tuple[int, ...], int]) -> Overlay:
    left, top, right, bottom = phrase["box"]
    label = f"{phrase['phrase']}: confidence {phrase['confidence']:.2f}"
    return Overlay(left, top, right - left, bottom - top, colors[tuple(phrase["span"])], label)


def _pieces(prompt: str, colors: Mapping[tuple[int, ...], int]) -> tuple[Piece, ...]:
    """Cut the prompt at the phrases' spans, which do not overlap."""
    pieces, place = [], 0
    for (start, end), color in sorted(colors.items()):
        pieces += [Piece(prompt[place:start]), Piece(prompt[start:end], color)]
        place = end
    return tuple(piece for piece in (*pieces, Piece(prompt[place:])) if piece.text)
