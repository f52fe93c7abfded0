"""Commands as a user types them, in processes of their own, on the tiny model and on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPU = ["--device", "cpu"]
TINY = (  # sizes for a CPU's seconds; dropout 0, because its masks are each process's own
    "--device cpu --resolution 32 --hidden_dim 16 --num_heads 2 --dim_feedforward 16 --num_queries_matching 2 "
    "--num_queries_rec 3 --dropout 0 --val_samples 5 --max_samples 50"
).split()


def dpt(*arguments: str | Path, processes: int = 0, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`python -m dpt_t2i ARGUMENTS`, or the same under `accelerate launch` with some processes.

    Args:
        processes: 0 = without a launcher.
        expect: exit code that the test asks for; None = any but 0 (a launcher has its own).
    """
    # `--cpu` starts one process whatever the number says (more would need MPI); `--multi_gpu` starts any number, and
    # `--device cpu` keeps them off a GPU that may be there.
    kind = ["--multi_gpu"] if processes > 1 else ["--cpu"]
    launcher = ["accelerate.commands.launch", *kind, "--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    command = [sys.executable, "-m", *(launcher if processes else []), "dpt_t2i", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    # The suite's own pytest may run under a launcher's variables: they must not reach the commands.
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == expect if expect is not None else done.returncode != 0, done.stderr[-4000:]
    return done


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that say why a command ended; a launcher's own report is not ours."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def files_of(folder: Path) -> list[str]:
    """Every file below a folder, by relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
