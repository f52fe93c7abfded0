"""`dpt scenes`: look at the world, or write it to disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from dpt_t2i.errors import InputError
from dpt_t2i.files import save_picture
from dpt_t2i.scenes.example import Split, make_example
from dpt_t2i.scenes.render import render
from dpt_t2i.scenes.world import Box


def render_grid(n: int, output: Path, seed: int = 0, size: int = 64, split: Split = "train") -> dict[str, Any]:
    """Draw `n` scenes into one picture, row by row, and tell their captions."""
    if n < 1 or size < 16:
        raise InputError(f"--n must be at least 1 and --size at least 16, got {n} and {size}")
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--output {output}: no picture format is called `{output.suffix}`; give a .png")
    examples = [make_example(index, seed=seed, split=split) for index in range(n)]
    columns = min(8, n)
    rows = -(-n // columns)
    grid = Image.new("RGB", (columns * (size + 2) - 2, rows * (size + 2) - 2), "white")
    for index, example in enumerate(examples):
        grid.paste(render(example.scene, size), ((index % columns) * (size + 2), (index // columns) * (size + 2)))
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_picture(grid, output)
    except ValueError as error:  # more pixels than the format has room for
        raise InputError(f"--output {output}: {error}; give a .png, or fewer scenes") from error
    captions = [example.caption.text for example in examples]
    return {"output": str(output), "captions": captions, "summary": [*captions, f"grid: {output}"]}


def export_scenes(output_dir: Path, n: int, seed: int = 0, size: int = 64, split: Split = "train") -> dict[str, Any]:
    """Write `n` examples as an imagefolder with `metadata.jsonl` (the native data format).

    Raises:
        InputError: `n` or `size` too small, or the folder holds something already.
    """
    if n < 1 or size < 16:
        raise InputError(f"--n must be at least 1 and --size at least 16, got {n} and {size}")
    unfinished = output_dir / ".partial"  # so that one that was stopped can begin anew
    if output_dir.is_dir() and any(entry != unfinished for entry in output_dir.iterdir()):
        raise InputError(f"{output_dir} is not empty, and its metadata would be replaced; give a new folder")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "negatives").mkdir(parents=True)
    lines = []
    for index in range(n):
        example = make_example(index, seed=seed, split=split)
        name, negative = f"{index:06d}.png", f"negatives/{index:06d}.png"
        render(example.scene, size).save(unfinished / name)
        render(example.negative.scene, size).save(unfinished / negative)
        expressions = [
            {
                "text": r.text,
                "spans": [list(r.span) for _ in r.boxes],
                "boxes": [_xywh(box, size) for box in r.boxes],
            }
            for r in example.expressions
        ]
        row = {
            "file_name": name,
            "captions": [example.caption.text],
            "expressions": expressions,
            "negatives": [{"caption": example.negative.caption.text, "rule": example.negative.rule}],
            "negative_file": negative,
        }
        lines.append(json.dumps(row))
    (unfinished / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for entry in sorted(unfinished.iterdir(), key=lambda entry: entry.suffix == ".jsonl"):  # the metadata last
        os.replace(entry, output_dir / entry.name)
    unfinished.rmdir()
    return {"output_dir": str(output_dir), "n": n, "summary": [f"{n} examples of split {split}, {size} px"]}


def _xywh(box: Box, size: int) -> list[float]:
    """xyxy fractions -> xywh pixels."""
    x0, y0, x1, y1 = (size * value for value in box)
    return [x0, y0, x1 - x0, y1 - y0]
