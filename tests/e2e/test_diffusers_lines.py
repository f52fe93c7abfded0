"""The five lines that bring self-correction into a diffusers pipeline, run as they stand in the docs and the README."""

import re
from pathlib import Path

import pytest

from dpt_t2i.sampling.guide import Guide

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "diffusers.md"


def five_lines(file: Path) -> list[str]:
    """The python blocks of a file that both make a `SelfCorrection` and load the model that they need."""
    blocks = re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if "SelfCorrection(" in block and "dpt_t2i.load(" in block]


def test_the_five_lines_run_and_correct(monkeypatch):
    moves: list[float] = []
    original = Guide.correct

    def watched(guide, latents, timestep, tokens):
        moved, scores = original(guide, latents, timestep, tokens)
        moves.append(float((moved - latents).norm() / latents.norm()))
        return moved, scores

    monkeypatch.setattr(Guide, "correct", watched)
    (code,) = five_lines(DOCS)
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    names: dict = {}
    exec(code, names)
    assert names["image"].size == (64, 64)
    # diffusers' default of 50 steps: the first half, as the adapter's stored setting says, but for the very first
    assert moves == pytest.approx([0.07] * 24, rel=1e-3)


def test_the_readme_shows_the_same_lines():
    assert five_lines(ROOT / "README.md") == five_lines(DOCS)
