"""What the README tells a stranger to type, typed."""

import re
import shlex
from pathlib import Path

import pytest

from dpt_t2i.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_lines_run():
    code = blocks("python")[0]
    names: dict = {}
    exec(code.replace("steps=30", "steps=2"), names)  # as a stranger would paste it, only shorter
    assert len(names["images"]) == 2
    assert all(image.size == (64, 64) for image in names["images"])


def test_the_generate_and_score_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    generate = next(line for line in lines if line.startswith("dpt generate"))
    assert main([*shlex.split(generate)[1:], "--steps", "2", "--output_dir", "out"]) == 0
    images = sorted(Path("out/images").glob("*.png"))
    assert [image.name for image in images] == [f"00000_{seed}.png" for seed in range(4)]
    score = next(line for line in lines if line.startswith("dpt score")).replace("image.png", str(images[0]))
    assert main([*shlex.split(score)[1:], "--output_dir", "scored"]) == 0
    assert Path("scored/score.json").is_file()


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_every_link_leads_somewhere(path):
    assert (Path(__file__).parents[2] / path).exists()
