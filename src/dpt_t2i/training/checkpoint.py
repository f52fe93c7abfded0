"""Checkpoints that are either whole or not there.

`checkpoint-N/` holds the artifacts (`adapter/`, LoRA), `optimizer.safetensors` (its state by parameter name) and
`state.json` (step, scaler, sizes of all files). Randomness needs no saving: it follows from (seed, step).

A checkpoint is written to a hidden folder, flushed to the disk and renamed; one that goes is renamed back first. So a
kill or a power cut at any moment leaves no half of one under the name `checkpoint-N`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dpt_t2i.errors import InputError

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # what it keeps of a parameter
_NAME = re.compile(r"checkpoint-(\d+)")

log = logging.getLogger(__name__)


def write_checkpoint(
    run: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    save_artifacts: Callable[[Path], None],
    extra: Mapping[str, Any],
    keep: int,
    spared: Collection[int] = (),
) -> Path:
    """Write `run/checkpoint-STEP` beside, rename it into place, and drop the oldest beyond `keep`.

    Args:
        spared: steps that rotation leaves alone, such as the best one's; they count beside `keep`.

    Raises:
        InputError: the disk is full or not writable; what was there before is untouched.
    """
    target, partial = run / f"checkpoint-{step}", run / f".checkpoint-{step}.partial"
    try:
        _clear_leftovers(run)
        partial.mkdir(parents=True)
        save_artifacts(partial)
        save_file(_moments(parameters, optimizer), partial / OPTIMIZER)
        state = {"step": step, "files": _sizes(partial), **extra}
        (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
        _flush(partial)
        if target.exists():  # not whole, or of a run that this one replaces
            _remove(target)
        os.replace(partial, target)
        _sync(run)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {target}: {error}; {told_intact(run)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    rotate(run, keep, spared)
    return target


def rotate(run: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Drop all but the newest `keep` checkpoints and those of the `spared` steps."""
    for number, old in checkpoints(run)[:-keep]:
        if number not in spared:
            _remove(old)


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints of a run folder with their steps, oldest first."""
    found = []
    for path in run.glob("checkpoint-*"):
        if _number(path) >= 0 and _is_whole(path):
            found.append((_number(path), path))
    return sorted(found)


def told_intact(run: Path) -> str:
    """For the message of a run that fails: what is left to go on from."""
    whole = checkpoints(run)
    return f"{whole[-1][1]} is intact" if whole else f"{run} holds no checkpoint yet"


def drop(old: Iterable[Path]) -> None:
    """Remove checkpoints, such as those of a run that another replaces: `latest` would find them."""
    for path in old:
        _remove(path)


def later(run: Path, step: int) -> list[Path]:
    """Whole checkpoints after `step`, oldest first."""
    return [path for number, path in checkpoints(run) if number > step]


def find_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """The folder that `resume_from_checkpoint` means; None = start afresh.

    `latest` is the newest whole one, or None where there is none at all: a scheduler gives the first start and every
    restart of a job the same command.

    Raises:
        InputError: a checkpoint was asked for and is not there, or not whole; or one of another run, while this folder
            has checkpoints of its own.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        whole = checkpoints(run)
        if not whole and not any(_number(path) >= 0 for path in run.glob("checkpoint-*")):
            log.warning("%s holds no checkpoint yet: the run starts from the beginning", run)
            return None
        if not whole:
            raise InputError(f"resume_from_checkpoint is `latest`, but {run} holds no whole checkpoint-N")
        newer = sorted(path.name for path in run.glob("checkpoint-*") if _number(path) > whole[-1][0])
        if newer:
            log.warning("%s: %s is not whole and is passed over", run, ", ".join(newer))
        return whole[-1][1]
    path = Path(wanted) if Path(wanted).is_dir() else run / wanted
    if not (path / STATE).is_file():
        there = ", ".join(found.name for _, found in checkpoints(run)) or "none"
        raise InputError(
            f"resume_from_checkpoint {wanted} is no checkpoint: {path / STATE} is missing; in {run} there are: {there} "
            "(--checkpoints_total_limit says how many stay)"
        )
    if not _is_whole(path):
        raise InputError(f"{path} is damaged: a file is missing or cut short; resume from an earlier one")
    if path.resolve().parent != run.resolve() and checkpoints(run):
        raise InputError(
            f"{path} is of another run, and {run} holds checkpoints of its own, which would be replaced; give another "
            "--output_dir or --run_name"
        )
    return path


def read_optimizer(
    checkpoint: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put the optimiser's state back and return `state.json`.

    Raises:
        InputError: a file is damaged, or the checkpoint is of other parameters.
    """
    try:
        moments = load_file(checkpoint / OPTIMIZER)
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{checkpoint} is damaged: {error}; resume from an earlier one") from error
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        name, _, part = key.rpartition("|")
        entries.setdefault(name, {})[part] = value
    strangers = set(entries) - set(parameters)
    if strangers or "step" not in state:
        what = f"it knows `{sorted(strangers)[0]}`" if strangers else f"{STATE} has no step"
        raise InputError(f"{checkpoint} is of another model: {what}; resume with that run's own config")
    for name, found in entries.items():  # a parameter without gradient so far has no entry
        parameter = parameters[name]
        if isinstance(optimizer, torch.optim.AdamW) and set(found) != ADAMW:
            raise InputError(f"{checkpoint / OPTIMIZER} is incomplete for `{name}`; resume from an earlier one")
        first = found.get("exp_avg", parameter)
        if first.shape != parameter.shape:
            raise InputError(f"{checkpoint} is of another model: `{name}` is {tuple(first.shape)} there")
        optimizer.state[parameter] = {part: _placed(part, value, parameter) for part, value in found.items()}
    return state


def _placed(part: str, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor | int:
    """AdamW counts steps in a float tensor on the CPU, the 8-bit one in an int."""
    if part == "step":
        return value if value.is_floating_point() else int(value)
    return value.to(parameter.device)


def _moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _is_whole(folder: Path) -> bool:
    """Every file that `state.json`, written last, counts up is there in full length."""
    try:
        files = json.loads((folder / STATE).read_text(encoding="utf-8")).get("files", {})
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def _number(folder: Path) -> int:
    """Step of a checkpoint's folder, -1 of any other."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def _remove(folder: Path) -> None:
    """Take its name first: what a kill leaves of it then is no checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # what a network disk holds on to goes with the next checkpoint


def _clear_leftovers(run: Path) -> None:
    for path in run.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    """To the disk itself, so that a power cut after the rename finds the bytes there."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
