"""Commands as a user types them, in processes of their own, on the tiny model and on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dpt_t2i.cli import main

ROOT = Path(__file__).parents[2]
CPU = ["--device", "cpu"]
TINY = (  # sizes for a CPU's seconds; dropout 0, because its masks are each process's own
    "--device cpu --resolution 32 --hidden_dim 16 --num_heads 2 --dim_feedforward 16 --num_queries_matching 2 "
    "--num_queries_rec 3 --dropout 0 --val_samples 5 --max_samples 50"
).split()


def dpt(*arguments: str | Path) -> None:
    """`dpt ARGUMENTS` in this very process, which spares the start of one."""
    assert main([str(argument) for argument in arguments]) == 0


def launch(*arguments: str | Path, processes: int, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`accelerate launch -m dpt_t2i ARGUMENTS`.

    Args:
        expect: exit code that the test asks for; None = any but 0 (a launcher has its own).
    """
    return _accelerate(["-m", "dpt_t2i", *map(str, arguments)], processes, expect)


def launch_all(commands: Sequence[Sequence[str | Path]], processes: int, script: Path) -> None:
    """Several commands one after another in the same processes, whose start is what takes long."""
    lines = [[str(word) for word in command] for command in commands]
    script.write_text(
        f"import sys\nfrom dpt_t2i.cli import main\nsys.exit(max(main(line) for line in {lines!r}))\n", encoding="utf-8"
    )
    _accelerate([str(script)], processes, expect=0)


def _accelerate(program: list[str], processes: int, expect: int | None) -> subprocess.CompletedProcess[str]:
    # `--cpu` starts one process whatever the number says (more would need MPI); `--multi_gpu` starts any number, and
    # `--device cpu` keeps them off a GPU that may be there.
    kind = ["--multi_gpu"] if processes > 1 else ["--cpu"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *program], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == expect if expect is not None else done.returncode != 0, done.stderr[-4000:]
    return done


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that say why a command ended; a launcher's own report is not ours."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def files_of(folder: Path) -> list[str]:
    """Every file below a folder, by relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
