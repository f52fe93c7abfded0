"""The generation folder: one PNG an image, which carries its own settings; a manifest; a contact sheet.

    images/{prompt:05d}_{seed}.png   settings as JSON in the text chunk `parameters`
    manifest.jsonl                   file prompt_index prompt seed arm score settings
    contact_sheet.png

A run that was stopped goes on image by image: a whole PNG made with the same settings is kept, anything else is made
again. Every file appears in one move, never half written. Several processes make a part of the missing images each.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dpt_t2i.errors import InputError, Stopped, signal_of
from dpt_t2i.files import in_one_move, write_text
from dpt_t2i.sampling.contact_sheet import contact_sheet
from dpt_t2i.sampling.generate import Generated, Job, check_text
from dpt_t2i.sampling.shares import share_of

log = logging.getLogger(__name__)

CHUNK = "parameters"
PNG_END = b"IEND\xaeB`\x82"
MANIFEST = "manifest.jsonl"

Make = Callable[[Sequence[Job]], Iterable[Generated]]


def write_shared(
    folder: Path, jobs: Sequence[Job], make: Make, settings: Mapping[str, Any], arm: str, state: PartialState
) -> list[dict[str, Any]]:
    """`write_generation` by all processes of `state`; the rows on the main one, [] on the others.

    An image depends on its prompt, seed and settings alone, so the number of processes changes nothing.

    Raises:
        Stopped: by Ctrl-C or SIGTERM; what is finished stays.
    """
    try:
        if state.num_processes > 1:
            (folder / "images").mkdir(parents=True, exist_ok=True)
            missing = [job for job in jobs if _finished(folder / image_file(job), _wanted(job, settings)) is None]
            state.wait_for_everyone()  # nobody writes before all have looked
            mine = [missing[i] for i in share_of(len(missing), state)]
            for job, image in zip(mine, make(mine) if mine else (), strict=True):
                write_image(folder, job, image, settings)
            state.wait_for_everyone()
        return write_generation(folder, jobs, make, settings, arm) if state.is_main_process else []
    except KeyboardInterrupt as interrupt:
        number = signal_of(interrupt)
        raise Stopped(
            number, f"{number.name}: stopped; the same command draws what is still missing in {folder}"
        ) from None


def write_generation(
    folder: Path,
    jobs: Sequence[Job],
    make: Make,
    settings: Mapping[str, Any],
    arm: str,
) -> list[dict[str, Any]]:
    """Make what is missing of `jobs` and describe all of them.

    Args:
        make: gives the images of some of the jobs, in their order (`generate` or a search, with all else bound).
        settings: plain JSON of all that decides an image beside prompt and seed; a difference means "make it again".
        arm: name of this way of generating, for comparisons.

    Returns:
        The rows of the manifest, in the order of `jobs`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[Job, dict[str, Any]] = {}
    missing: list[Job] = []
    for job in jobs:
        result = _finished(folder / image_file(job), _wanted(job, settings))
        if result is None:
            missing.append(job)
        else:
            rows[job] = _row(job, settings, arm, result)
    drawn = zip(missing, make(missing), strict=True) if missing else iter(())
    first = next(drawn, None)  # what cannot be drawn at all is refused here, before anything is replaced
    replaced = sum((folder / image_file(job)).is_file() for job in missing)
    if replaced:
        log.warning(
            "%d images in %s are of other prompts or settings, or damaged, and are drawn anew; another output_dir "
            "would keep them",
            replaced, folder,
        )  # fmt: skip
    _write_manifest(folder, list(rows.values()))
    if missing:
        with (folder / MANIFEST).open("a", encoding="utf-8") as manifest:
            for job, image in chain([first] if first is not None else [], drawn):
                rows[job] = _row(job, settings, arm, write_image(folder, job, image, settings))
                manifest.write(json.dumps(rows[job]) + "\n")
                manifest.flush()
    ordered = [rows[job] for job in jobs]
    _write_manifest(folder, ordered)
    _save_png(folder / "contact_sheet.png", contact_sheet(folder, ordered))
    others = len(list((folder / "images").glob("*.png"))) - len({row["file"] for row in ordered})
    if others:
        log.warning(
            "%d more images lie in %s, of other prompts or seeds than now; manifest and contact sheet leave them out",
            others, folder / "images",
        )  # fmt: skip
    return ordered


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The rows of a generation folder's manifest, by prompt and seed.

    Raises:
        InputError: there is none, a line of it is broken, it lists nothing, or an image of it is not there.
    """
    path = folder / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder} is no generation folder ({error}); give one that `dpt generate` made") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row |= {"prompt_index": int(row["prompt_index"]), "seed": int(row["seed"])}
            file, prompt = row["file"], row["prompt"]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{path}, line {number} is broken ({error!r}); generate the folder again") from error
        if not isinstance(prompt, str) or not isinstance(file, str) or Path(file).is_absolute():
            raise InputError(f"{path}, line {number}: `prompt` must be a text and `file` a path inside the folder")
        if not (folder / file).is_file():
            raise InputError(f"{path}, line {number}: no image {file}; run the same `dpt generate` once more")
        check_text(prompt)
        rows.append(row)
    if not rows:
        raise InputError(f"{path} lists no image; run the same `dpt generate` once more")
    return sorted(rows, key=lambda row: (row["prompt_index"], row["seed"]))


def image_file(job: Job) -> str:
    """Path of a job's image, relative to the generation folder."""
    return f"images/{job.prompt_index:05d}_{job.seed}.png"


def read_parameters(path: Path) -> dict[str, Any] | None:
    """What a PNG says of its own making; None if it is missing, damaged, cut short, or not one of ours."""
    try:
        if not path.read_bytes().endswith(PNG_END):
            return None  # Pillow forgives a short tail
        with Image.open(path) as image:
            image.load()
            parameters = json.loads(image.info[CHUNK])
    except (OSError, SyntaxError, ValueError, KeyError):
        return None
    return parameters if isinstance(parameters, dict) else None


def write_image(folder: Path, job: Job, image: Generated, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Save a job's image as `image_file` says, with all that made it; what came of it, for the manifest."""
    result = {"score": image.score, "noise_seed": image.job.noise_seed}  # a search may have chosen another noise
    _save_png(folder / image_file(job), image.image, {**_wanted(job, settings), "result": result})
    return result


def _wanted(job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": job.prompt, "seed": job.seed, "settings": dict(settings)}


def _finished(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result stored in a whole image that was made as wanted; None if it must be made."""
    stored = read_parameters(path)
    same_json = json.loads(json.dumps(wanted))  # tuples come back from JSON as lists
    if stored is not None and "config" not in stored.get("settings", {}).get("base", {"config": None}):
        same_json["settings"].get("base", {}).pop("config", None)  # images of before it was told still count
    if stored is None or any(stored.get(key) != value for key, value in same_json.items()):
        return None
    result: dict[str, Any] | None = stored.get("result")
    return result


def _row(job: Job, settings: Mapping[str, Any], arm: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "file": image_file(job),
        "prompt_index": job.prompt_index,
        "prompt": job.prompt,
        "seed": job.seed,
        "arm": arm,
        "score": result["score"],
        "settings": {**settings, "noise_seed": result["noise_seed"]},
    }


def _save_png(path: Path, image: Image.Image, parameters: Mapping[str, Any] | None = None) -> None:
    info = PngInfo()
    if parameters is not None:
        info.add_text(CHUNK, json.dumps(parameters))
    with in_one_move(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=info)


def _write_manifest(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(folder / MANIFEST, "".join(json.dumps(row) + "\n" for row in rows))
