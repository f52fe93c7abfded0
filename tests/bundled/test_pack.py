"""Which run of stage 2 ships."""

import importlib
import os
from pathlib import Path

import pytest

LORA = "pytorch_lora_weights.safetensors"


def run(folder, name, time):
    """A finished run whose LoRA was written at `time`."""
    (folder / name / "adapter").mkdir(parents=True, exist_ok=True)
    file = folder / name / LORA
    file.touch()
    os.utime(file, (time, time))
    return folder / name


def test_the_last_run_ships_unless_an_earlier_one_was_made_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools/bundled")  # its scripts import each other by name
    pack = importlib.import_module("pack")
    monkeypatch.setattr(pack, "WORK", tmp_path)
    assert pack._last_of_stage_2() is None
    first = run(tmp_path, "tune", 1000)
    assert pack._last_of_stage_2() == first
    last = run(tmp_path, "tune_kept", 2000)
    assert pack._last_of_stage_2() == last
    run(tmp_path, "tune", 3000)
    with pytest.raises(SystemExit, match="tune is newer than .*tune_kept"):
        pack._last_of_stage_2()
    run(tmp_path, "tune_kept", 4000)
    (last / "adapter").rmdir()
    with pytest.raises(SystemExit, match="no adapter"):
        pack._last_of_stage_2()
