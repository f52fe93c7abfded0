"""Does a run that is killed again and again end where an uninterrupted one ends? -> benchmarks/results/resume.json.

    python benchmarks/resume.py --kills 20
    python benchmarks/resume.py --kills 20 --base PATH/TO/DIFFUSERS/FOLDER

The same short stage 2 of the bundled model, or of another one, twice: once straight through, once with SIGKILL at
random moments, every third time in the middle of writing a checkpoint. Compared bit for bit, in float32 on the CPU:
adapter, LoRA, its average, the optimiser's moments, schedule and counters, and every figure of `metrics.jsonl` but
images per second.

Every run is the command `dpt tune` in a process of its own, a fork of this one: it is killed like any other, but has
everything imported, which spares twenty starts of ten seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from dpt_t2i.cli import main as dpt
from dpt_t2i.evaluation.provenance import versions
from dpt_t2i.training import probe as _probe  # noqa: F401  # imported here, the forks need not
from dpt_t2i.training import tune as _tune  # noqa: F401
from dpt_t2i.training.checkpoint import checkpoints, find_checkpoint

SETTINGS = (
    "--device cpu --dropout 0.1 --train_batch_size 1 --gradient_accumulation_steps 2 --checkpointing_steps 1 "
    "--validation_steps 10 --ema_decay 0.9 --sample_every 0 --random_flip --on_policy_fraction 0.3 "
    "--on_policy_every 7 --on_policy_pool 2 --on_policy_steps 2"
).split()
SIZES = "--hidden_dim 32 --dim_feedforward 64 --val_samples 2".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps; default: 4 a kill")
    parser.add_argument("--base", default="bundled", help="`bundled`, or a diffusers folder")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=Path("runs/resume"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/resume.json"))
    args = parser.parse_args()
    steps = args.steps or 4 * args.kills + 1
    shutil.rmtree(args.folder, ignore_errors=True)
    start = time.perf_counter()
    probe, straight, killed = (args.folder / name for name in ("probe", "straight", "killed"))
    base = ["--pretrained_model_name_or_path", args.base]
    _finish(["probe", *base, "--device", "cpu", *SIZES, "--max_train_steps", "1", "--output_dir", str(probe)])
    tune = ["tune", *base, "--adapter", str(probe), *SETTINGS, *SIZES, "--max_train_steps", str(steps), "--output_dir"]
    _finish([*tune, str(straight)])
    kills = _kill_again_and_again([*tune, str(killed)], killed, args.kills, random.Random(args.seed))
    _finish([*tune, str(killed), *_resume(killed)])
    want, got = _state(straight, steps), _state(killed, steps)
    differing = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
    result = {
        "kills": args.kills,
        "kills_survived": len(kills) if not differing else 0,
        "kills_while_writing_a_checkpoint": sum(kill["writing"] for kill in kills),
        "identical": not differing,
        "differing": differing,
        "states_compared": sorted(want),
        "base": Path(args.base).name,  # no path of this machine
        "steps": steps,
        "moments": kills,
        "settings": " ".join([*SETTINGS, *SIZES]),
        "seconds": round(time.perf_counter() - start, 1),
        "command": f"python benchmarks/resume.py --kills {args.kills} --steps {steps} --seed {args.seed} "
        f"--base {Path(args.base).name}",
        "versions": versions(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(f"differs: {differing}" if differing else 0)


def _start(command: list[str]) -> ForkProcess:
    """`dpt COMMAND` in a fork, on one thread."""

    def body() -> None:
        torch.set_num_threads(1)
        sys.exit(dpt(command))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def _finish(command: list[str]) -> None:
    process = _start(command)
    process.join()
    if process.exitcode:
        raise SystemExit(f"dpt {' '.join(command)} ended with {process.exitcode}")


def _resume(folder: Path) -> list[str]:
    return ["--resume_from_checkpoint", "latest"] if checkpoints(folder) else []


def _kill_again_and_again(command: list[str], folder: Path, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Each time: wait for one or two new checkpoints, then kill at a random moment or while one is being written."""
    kills = []
    for number in range(count):
        before = _newest(folder)
        wanted = before + rng.choice((1, 2))
        process = _start([*command, *_resume(folder)])
        while _newest(folder) < wanted:
            _still_running(process)
            time.sleep(0.01)
        if number % 3 == 2:
            while not _is_writing(folder):
                _still_running(process)
                time.sleep(0.001)
        else:
            time.sleep(0.5 * rng.random())
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"the run ended by itself with {process.exitcode}; give it more --steps")
        kills.append({"from_step": before, "newest_whole": _newest(folder), "writing": _is_writing(folder)})
    return kills


def _newest(folder: Path) -> int:
    return int(find_checkpoint(folder, "latest").name.rpartition("-")[2]) if checkpoints(folder) else 0  # type: ignore[union-attr]


def _is_writing(folder: Path) -> bool:
    return any(folder.glob(".checkpoint-*.partial"))


def _still_running(process: ForkProcess) -> None:
    if not process.is_alive():
        raise SystemExit(f"the run ended by itself with {process.exitcode}; give it more --steps")


def _state(run: Path, steps: int) -> dict[str, Any]:
    last = run / f"checkpoint-{steps}"
    weights = {
        str(path.relative_to(run)): _without_header(path)
        for folder in (last, run / "adapter", run / "ema")
        for path in sorted(folder.rglob("*.safetensors"))
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    del state["files"]  # sizes: headers hold the folder's name
    figures = [{key: row[key] for key in row if key != "images_per_s"} for row in rows]
    kept = [step for step, _ in checkpoints(run)]
    return weights | {"metrics.jsonl": figures, f"checkpoint-{steps}/state.json": state, "checkpoints kept": kept}


def _without_header(path: Path) -> bytes:
    """The numbers of a safetensors file; its header holds the run's folder."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
