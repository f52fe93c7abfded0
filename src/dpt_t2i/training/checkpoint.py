"""Checkpoints that are either whole or not there.

`checkpoint-N/` holds the artifacts (`adapter/`, LoRA), `optimizer.safetensors` (AdamW's moments by parameter name) and
`state.json` (step, scaler). Randomness needs no saving: it follows from (seed, step).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dpt_t2i.errors import InputError

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(
    run: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    save_artifacts: Callable[[Path], None],
    extra: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `run/checkpoint-STEP` beside, rename it into place, and drop the oldest beyond `keep`.

    Raises:
        InputError: the disk is full or not writable; what was there before is untouched.
    """
    target, partial = run / f"checkpoint-{step}", run / f".checkpoint-{step}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_artifacts(partial)
        save_file(_moments(parameters, optimizer), partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps({"step": step, **extra}), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {target}: {error}; earlier checkpoints in {run} are intact") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for _, old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Whole checkpoints of a run folder with their steps, oldest first."""
    found = []
    for path in run.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / STATE).is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def drop_later(run: Path, step: int) -> None:
    """Remove checkpoints after `step`: they are of a run that this one replaces, and `latest` would find them."""
    for number, path in checkpoints(run):
        if number > step:
            shutil.rmtree(path)


def find_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """The folder that `resume_from_checkpoint` means; None = start afresh.

    Raises:
        InputError: a checkpoint was asked for and is not there.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        whole = checkpoints(run)
        if not whole:
            raise InputError(f"resume_from_checkpoint is `latest`, but {run} holds no whole checkpoint-N")
        return whole[-1][1]
    path = Path(wanted) if Path(wanted).is_dir() else run / wanted
    if not (path / STATE).is_file():
        raise InputError(f"resume_from_checkpoint {wanted} is no checkpoint: {path / STATE} is missing")
    return path


def read_optimizer(
    checkpoint: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put AdamW's moments back and return `state.json`.

    Raises:
        InputError: a file is damaged, or the checkpoint is of other parameters.
    """
    try:
        moments = load_file(checkpoint / OPTIMIZER)
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{checkpoint} is damaged: {error}; resume from an earlier one") from error
    strangers = {key.split("|")[0] for key in moments} - set(parameters)
    if strangers or "step" not in state:
        what = f"it knows `{sorted(strangers)[0]}`" if strangers else f"{STATE} has no step"
        raise InputError(f"{checkpoint} is of another model: {what}; resume with that run's own config")
    for name, parameter in parameters.items():
        entries = {key: moments.get(f"{name}|{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if any(value is None for value in entries.values()):
            if any(key.startswith(f"{name}|") for key in moments):
                raise InputError(f"{checkpoint / OPTIMIZER} is incomplete for `{name}`; resume from an earlier one")
            continue  # had no gradient yet
        first = entries["exp_avg"]
        if first is not None and first.shape != parameter.shape:
            raise InputError(f"{checkpoint} is of another model: `{name}` is {tuple(first.shape)} there")
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device)  # type: ignore[union-attr]
            for key, value in entries.items()
        }
    return state


def _moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
