"""`dpt data inspect`: what a data set holds, how large it is, and everything about it that looks wrong."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from dpt_t2i.config import DataConfig, InspectConfig
from dpt_t2i.data.faults import Faults
from dpt_t2i.data.imagefolder import METADATA, misspelt_keys
from dpt_t2i.data.index import RecordIndex
from dpt_t2i.data.records import Record
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.data.sheet import contact_sheet
from dpt_t2i.data.sources import count, read_source, refuse_unread
from dpt_t2i.errors import InputError
from dpt_t2i.files import in_one_move, write_text

SCENES = 1000  # drawn scenes that are looked at unless max_samples says otherwise
SCENE_SIZE = 64  # pixels
SHOWN = 10  # findings of a kind that are told; the file holds all


@dataclass
class Findings:
    """What opening every picture shows; sizes in pixels."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    suspicious: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # kind -> where and what
    unreadable: set[int] = field(default_factory=set)  # rows whose picture cannot be opened

    def add(self, kind: str, what: str) -> None:
        self.suspicious[kind].append(what)


def run_inspect(config: InspectConfig) -> dict[str, Any]:
    """Read a data set whole, open every picture; writes `inspection.json` and `contact_sheet.png`.

    Raises:
        InputError: the data set cannot be read at all; a broken record is a finding, not an error.
    """
    faults = Faults("skip")
    records = _records(config, faults)
    findings = look(records)
    for where, key, meant in misspelt_keys(Path(config.dataset), config.split):
        findings.add("unknown key", f"{where}: `{key}` is not read; did you mean `{meant}`?")
    for fault in faults.found:
        findings.add("broken", f"{fault.where}: {fault.reason}")
    rows = _spread([row for row in range(len(records)) if row not in findings.unreadable], config.sheet_samples)
    sheet = config.output_dir / "contact_sheet.png"
    with in_one_move(sheet) as unfinished:
        contact_sheet([records[row] for row in rows], config.sheet_size).save(unfinished, format="PNG")
    other = "val" if config.split == "train" else "train"
    elsewhere = Path(config.dataset) / other
    result = {
        "dataset": config.dataset,
        "counts": asdict(count(records)),
        "sizes": _sizes(findings.sizes),
        "suspicious": {kind: list(found) for kind, found in sorted(findings.suspicious.items())},
        "contact_sheet": str(sheet),
    }
    file = config.output_dir / "inspection.json"
    write_text(file, json.dumps(result, indent=1) + "\n")
    lines = [*_lines(result), f"contact sheet: {sheet}"]
    if (
        config.split == "val"
        and not (Path(config.dataset) / "val").is_dir()
        and (Path(config.dataset) / METADATA).is_file()
    ):
        lines.append(f"all of its records: {config.dataset} has no folder `val`, so training holds out the last ones")
    if elsewhere.is_dir():
        lines.append(f"of the part `{config.split}` alone; --split {other} looks at {elsewhere}")
    return result | {"summary": lines}


def look(records: Sequence[Record]) -> Findings:
    """Open every picture once and compare all records with each other."""
    findings = Findings()
    pictures: dict[bytes, dict[str, str]] = defaultdict(dict)  # content -> picture -> first record that shows it
    captions: dict[str, set[str]] = defaultdict(set)
    for row, record in enumerate(records):
        name = _name(record)
        image = _open(record, findings)
        if image is None:
            findings.unreadable.add(row)
        else:
            findings.sizes[image.size] += 1
            content = hashlib.sha1(image.tobytes() + str(image.size).encode()).digest()
            pictures[content].setdefault(record.picture, name)
            for expression in record.expressions:
                try:
                    record.check_boxes(expression.boxes, image.size)
                except ValueError as error:
                    findings.add("box outside", f"{name}: {error}")
                if small := [list(box) for box in expression.boxes if max(box[2:]) <= 1]:
                    findings.add("box of a pixel", f"{name}: {small[0]}; boxes are in pixels, are these fractions?")
        for caption in record.captions:
            captions[caption].add(record.picture)
        _compare_texts(record, name, findings)
    for names in pictures.values():
        if len(names) > 1:
            findings.add("duplicate picture", " = ".join(names.values()))
    for caption, owners in captions.items():
        if len(owners) > 1:
            findings.add("duplicate caption", f"{caption!r} of {len(owners)} pictures")
    return findings


def _open(record: Record, findings: Findings) -> Image.Image | None:
    try:
        image = record.load_image()
    except InputError as error:
        findings.add("unreadable", f"{_name(record)}: {error}")
        return None
    for number in range(len(record.more_negative_images) + 1):
        try:
            record.load_negative_image(number)
        except InputError as error:
            findings.add("unreadable negative", f"{_name(record)}: {error}")
    return image


def _compare_texts(record: Record, name: str, findings: Findings) -> None:
    if len(set(record.captions)) < len(record.captions):
        findings.add("caption twice", name)
    for negative in record.negatives:
        if negative.caption in record.captions:
            findings.add("negative is a caption", f"{name}: {negative.caption!r}")
    boxes_of: dict[str, set[Any]] = defaultdict(set)
    for expression in record.expressions:
        boxes_of[expression.text].add(expression.boxes)
    for text, boxes in boxes_of.items():
        if len(boxes) > 1:
            findings.add("ambiguous expression", f"{name}: {text!r} names {len(boxes)} different things")


def _records(config: InspectConfig, faults: Faults) -> Sequence[Record]:
    if config.dataset == "scenes" and config.data_format in ("auto", "scenes"):
        return SceneRecords("train", config.max_samples or SCENES, SCENE_SIZE)
    data = DataConfig(
        dataset=config.dataset,
        data_format=config.data_format,
        image_root=config.image_root,
        annotations=config.annotations,
        train_split=config.split,
        on_bad="skip",
    )
    refuse_unread(data)
    records = RecordIndex(islice(read_source(data, "train", faults), config.max_samples))
    if not records:
        first = f"; first fault: {faults.found[0].where}: {faults.found[0].reason}" if faults.found else ""
        raise InputError(f"{config.dataset}: no whole record among {len(faults.found)} broken ones{first}")
    return records


def _spread(rows: Sequence[int], wanted: int) -> list[int]:
    """`wanted` of the rows, evenly spread."""
    if len(rows) <= wanted:
        return list(rows)
    return [rows[number * len(rows) // wanted] for number in range(wanted)]


def _name(record: Record) -> str:
    return f"{record.source}/{record.id}"


def _sizes(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    """Smallest, largest and commonest widths and heights."""
    if not sizes:
        return {"distinct": 0}
    common = [{"width": w, "height": h, "pictures": n} for (w, h), n in sizes.most_common(5)]
    widths, heights = [w for w, _ in sizes], [h for _, h in sizes]
    return {
        "distinct": len(sizes),
        "width": [min(widths), max(widths)],
        "height": [min(heights), max(heights)],
        "commonest": common,
    }


def _lines(result: Mapping[str, Any]) -> list[str]:
    counts, sizes = result["counts"], result["sizes"]
    lines = [
        f"{counts['records']} records, {counts['captions']} captions, {counts['expressions']} expressions with "
        f"{counts['boxes']} boxes",
        f"without expression: {counts['without_expression']} (their grounding loss is masked); hard negatives: "
        f"{counts['negatives']} captions, {counts['negative_images']} images; without a hard caption: "
        f"{counts['without_negative']}",
    ]
    if sizes["distinct"]:
        (low, high), (short, tall) = sizes["width"], sizes["height"]
        lines.append(f"pictures: {sizes['distinct']} sizes, width {low} to {high}, height {short} to {tall} pixels")
    for kind, found in result["suspicious"].items():
        lines.append(f"suspicious: {kind}, {len(found)}")
        lines.extend(f"  {text[:200]}" for text in found[:SHOWN])
        if len(found) > SHOWN:
            lines.append(f"  and {len(found) - SHOWN} more in inspection.json")
    if not result["suspicious"]:
        lines.append("nothing suspicious")
    return lines
