"""Two runs side by side, with figures that were written by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpt_t2i.cli import main
from dpt_t2i.errors import InputError
from dpt_t2i.training import runs
from dpt_t2i.training.runs import compare_runs


def run_folder(folder: Path, rate: float, itm: list[float], steps: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"train:\n  learning_rate: {rate}\n  rank: 4\nseed: 0\noutput_dir: {folder}\n")
    rows: list[dict[str, Any]] = [{"step": 10 * i, "split": "val", "itm_text": value} for i, value in enumerate(itm)]
    rows += [
        {"step": step, "split": "train", "loss": rate * step, "images_per_s": 3.0} for step in range(10, steps + 1, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return (
        run_folder(tmp_path / "slow", 0.5, [0.9, 0.6, 0.5], 20),
        run_folder(tmp_path / "fast", 2.0, [0.9, 0.4, 0.6, 0.8], 30),
    )


def test_settings_and_figures_that_differ(two, tmp_path):
    found = compare_runs(*two, tmp_path / "out" / "plot.png")
    assert found["settings"] == {"train.learning_rate": [0.5, 2.0]}
    assert found["figures"] == {
        "last step": [20, 30],
        "train, step 20: loss": [10.0, 40.0],  # the last step that both have
        "train, step 20: images_per_s": [3.0, 3.0],
        "val, last: itm_text": [0.5, 0.8],
        "best step": [10, 30],  # the baseline does not count
        "val, best step: itm_text": [0.6, 0.8],
    }
    assert ["train,", "step", "20:", "loss", "10", "40"] in [line.split() for line in found["summary"]]
    with Image.open(tmp_path / "out" / "plot.png") as picture:
        assert picture.width == 1200
        colors = {color for _, color in picture.convert("RGB").getcolors(picture.width * picture.height)}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colors, "a line for each run"


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    a, b = (run_folder(tmp_path / parent / "tune", 0.5, [0.5, 0.5], 10) for parent in ("x", "y"))
    summary = compare_runs(a, b, tmp_path / "plot.png")["summary"]
    assert summary[0] == "the same settings"
    assert str(a) in summary[3] and str(b) in summary[3]


def test_settings_that_are_none_and_pictures_of_no_kind(two, tmp_path):
    (two[0] / "config.yaml").write_text("")
    assert compare_runs(*two, tmp_path / "plot.png")["settings"]["train.learning_rate"] == [None, 2.0]
    (two[0] / "config.yaml").write_text("- a list")
    with pytest.raises(InputError, match=r"config.yaml holds no settings"):
        compare_runs(*two, tmp_path / "plot.png")
    with pytest.raises(InputError, match=r"no picture format is called `\.foo`; give a \.png"):
        compare_runs(*two, tmp_path / "plot.foo")


def test_a_folder_that_is_no_run_is_named(two, tmp_path):
    with pytest.raises(InputError, match=r"empty is no run folder: .*metrics\.jsonl is missing or empty"):
        compare_runs(two[0], tmp_path / "empty", tmp_path / "plot.png")


def test_the_command_prints_the_table(two, tmp_path, capsys):
    assert main(["runs", "compare", *map(str, two), "--output", str(tmp_path / "plot.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["train.learning_rate", "0.5", "2"] for line in lines)
    assert main(["runs", "compare", *map(str, two), "--output", str(tmp_path / "plot.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"train.learning_rate": [0.5, 2.0]}


def test_a_run_has_one_colour_in_every_panel(tmp_path, monkeypatch):
    """Where the second run alone has a figure, its line is its own, not the first one's."""
    drawn = []
    monkeypatch.setattr(runs.Figure, "savefig", lambda figure, path, **__: (drawn.append(figure), path.touch()))
    first = [{"split": "train", "step": 1, "loss": 1.0}]
    second = [{"split": "train", "step": 1, "loss": 2.0, "loss_mse": 3.0}]
    runs.plot([first, second], ["p", "t"], tmp_path / "a.png")
    lines = {(axis.get_title(), line.get_label()): line.get_color() for axis in drawn[0].axes for line in axis.lines}
    assert lines == {("train: loss", "p"): "C0", ("train: loss", "t"): "C1", ("train: loss_mse", "t"): "C1"}
    empty = [axis for axis in drawn[0].axes if not axis.lines]
    assert len(empty) == runs.COLUMNS - 2 and not any(axis.axison for axis in empty)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["p", "t"]


def test_the_best_step_is_that_of_each_runs_own_metric(two, tmp_path):
    config = two[1] / "config.yaml"
    config.write_text(config.read_text().replace("  rank: 4", "  rank: 4\n  best_metric: loss_x"))
    file = two[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | ({"loss_x": 1.0 - row["itm_text"]} if row["step"] != 30 else {"loss_x": 0.9}) for row in rows
            if row["split"] == "val"]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare_runs(*two, tmp_path / "plot.png")["figures"]["best step"] == [10, 20], "by itm_text it were 30"


def test_runs_without_a_figure_have_an_empty_plot(tmp_path):
    runs = [run_folder(tmp_path / name, 1.0, [], 0) for name in "ab"]
    for run in runs:
        (run / "metrics.jsonl").write_text('{"step": 0, "split": "val"}\n')
    assert compare_runs(*runs, tmp_path / "plot.png")["figures"]["best step"] == [None, None]
    assert (tmp_path / "plot.png").is_file()
