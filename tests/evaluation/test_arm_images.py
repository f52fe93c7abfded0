"""Two processes make the images that one would."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dpt_t2i.config import GenerateConfig
from dpt_t2i.evaluation.arm_images import borrow_images, make_images
from dpt_t2i.sampling.generate import Generated, Job
from dpt_t2i.sampling.shares import processes

JOBS = [Job(prompt, f"prompt {prompt}", seed, seed) for prompt in range(3) for seed in (0, 1)]


class Painter:
    """Each image is one shade, which follows from prompt and seed."""

    made = 0

    def run(self, jobs: Sequence[Job], config: GenerateConfig, on_step: object = None) -> Iterator[Generated]:
        for job in jobs:
            self.made += 1
            shade = (40 * job.prompt_index, 90 * job.seed, 7)
            yield Generated(job, Image.new("RGB", (32, 32), shade), torch.zeros(1), 0.5)

    def settings(self, config: GenerateConfig) -> dict[str, Any]:
        return {"painter": 1}


def paint(folder: Path) -> None:
    state = processes("cpu")
    assert state.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    rows = make_images(folder, JOBS, Painter(), GenerateConfig(), "base", state)  # type: ignore[arg-type]
    assert len(rows) == (6 if state.is_main_process else 0)


def contents(folder: Path) -> dict[str, Any]:
    pictures = {path.name: Image.open(path).tobytes() for path in sorted((folder / "images").iterdir())}
    return {**pictures, "manifest": [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]}


class Half:
    """Process `rank` of two, as accelerate shows itself to it."""

    num_processes = 2

    def __init__(self, rank: int) -> None:
        self.process_index, self.is_main_process, self.waited = rank, rank == 0, 0

    def wait_for_everyone(self) -> None:
        self.waited += 1


def test_each_process_makes_its_part_and_the_main_one_describes_all(tmp_path: Path) -> None:
    paint(tmp_path / "one")
    painters = {rank: Painter() for rank in (1, 0)}
    for rank, painter in painters.items():
        state = Half(rank)
        rows = make_images(tmp_path / "two", JOBS, painter, GenerateConfig(), "base", state)  # type: ignore[arg-type]
        assert len(rows) == (0 if rank else 6) and state.waited == 2
    assert [painter.made for painter in painters.values()] == [3, 3]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"images", "manifest.jsonl", "contact_sheet.png"}


def test_a_process_without_work_waits_too(tmp_path: Path) -> None:
    state = Half(1)
    assert make_images(tmp_path, JOBS[:1], Painter(), GenerateConfig(), "base", state) == []  # type: ignore[arg-type]
    assert state.waited == 2, "once before anybody writes, once for the last image"


@pytest.mark.slow
def test_under_accelerate_launch(tmp_path: Path) -> None:
    paint(tmp_path / "one")
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.evaluation.test_arm_images import paint\n"
        f"paint(Path({str(tmp_path / 'two')!r}))\n"
    )
    root = Path(__file__).parents[2]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",  # `--cpu` would start one process
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    done = subprocess.run(
        [*launch, "--mixed_precision", "no", "--main_process_port", "0", str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_borrowed_images_are_copies_and_never_overwrite(tmp_path: Path) -> None:
    paint(tmp_path / "one")
    (tmp_path / "other" / "images").mkdir(parents=True)
    (tmp_path / "other" / "images" / "00000_0.png").write_bytes(b"mine")
    borrow_images(tmp_path / "other", tmp_path / "one", [*JOBS[:2], Job(9, "not made", 0, 0)])
    assert (tmp_path / "other" / "images" / "00000_0.png").read_bytes() == b"mine"
    same = "images/00000_1.png"
    assert (tmp_path / "other" / same).read_bytes() == (tmp_path / "one" / same).read_bytes()
    assert len(list((tmp_path / "other" / "images").iterdir())) == 2
