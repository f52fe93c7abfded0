"""One process or two: the same training, the same images, the same figures, and one voice."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpt_t2i.data.examples import _order
from dpt_t2i.scenes.commands import export_scenes
from tests.e2e.launching import CPU, TINY, dpt, error_lines, files_of
from tests.tiny import tiny_pipeline

pytestmark = pytest.mark.slow
RATE = 1e-3
TRAIN = [*TINY, "--max_train_steps", "3", "--learning_rate", str(RATE), "--gradient_accumulation_steps", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def probed(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stage 1 on one process with twice the batch, and on two."""
    folder = tmp_path_factory.mktemp("probe")
    model = ["--pretrained_model_name_or_path", base]
    dpt("probe", *model, *TRAIN, "--train_batch_size", "4", "--output_dir", folder / "one")
    dpt("probe", *model, *TRAIN, "--train_batch_size", "2", "--output_dir", folder / "two", processes=2)
    return folder / "one", folder / "two"


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in rows]


def assert_same_run(one: Path, two: Path) -> None:
    """Same files, figures and weights, up to the order in which numbers are added."""
    assert files_of(one) == files_of(two)
    for mine, theirs in zip(metrics(one), metrics(two), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5)
    for file in one.rglob("*.safetensors"):
        if file.name == "optimizer.safetensors":
            continue
        want, got = load_file(file), load_file(two / file.relative_to(one))
        assert want.keys() == got.keys()
        far = {name: float((want[name] - got[name]).abs().max()) for name in want}
        # AdamW moves each number by about the rate a step: a lost example or share would show as that.
        assert max(far.values()) < 0.1 * RATE, max(far, key=lambda name: far[name])


def test_probing_is_the_same(probed: tuple[Path, Path]) -> None:
    assert_same_run(*probed)


def test_tuning_is_the_same(base: str, probed: tuple[Path, Path], tmp_path: Path) -> None:
    common = ["--pretrained_model_name_or_path", base, *TRAIN, "--gradient_checkpointing", "--qformer_ckpt", probed[0]]
    dpt("tune", *common, "--train_batch_size", "4", "--output_dir", tmp_path / "one")
    dpt("tune", *common, "--train_batch_size", "2", "--output_dir", tmp_path / "two", processes=2)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert all("loss_mse" in row for row in metrics(tmp_path / "one"))


def test_a_failure_of_one_process_ends_all_with_one_line(base: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split, count in (("train", 12), ("val", 4)):
        export_scenes(data / split, n=count, seed=0, size=32, split="train")
    order = _order(0, 0, 12)  # of two processes with a batch of one, the second begins with place 1
    names = [json.loads(line)["file_name"] for line in (data / "train" / "metadata.jsonl").read_text().splitlines()]
    broken = data / "train" / names[order[1]]
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    start = time.monotonic()
    common = ["--pretrained_model_name_or_path", base, *TINY, "--dataset", data, "--dataloader_num_workers", "1"]
    done = dpt("probe", *common, "--train_batch_size", "1", "--output_dir", tmp_path, processes=2, expect=None)
    assert time.monotonic() - start < 600, "the other process does not wait for the lost one"
    (line,) = error_lines(done)
    assert line.startswith(f"error: cannot read image {broken}: ") and line.endswith("replace or remove the file")
    assert not (tmp_path / "adapter").exists()


def test_bad_input_that_all_meet_is_told_once(tmp_path: Path) -> None:
    done = dpt("probe", "--lerning_rate=1", processes=2, expect=None)
    assert error_lines(done) == ["error: unknown option `--lerning_rate`; did you mean `--learning_rate`?"]


def pictures(folder: Path) -> dict[str, torch.Tensor]:
    import numpy as np
    from PIL import Image

    return {p.name: torch.from_numpy(np.array(Image.open(p)).astype("int16")) for p in (folder / "images").iterdir()}


def test_generation_is_the_same_and_goes_on_image_by_image(
    base: str, probed: tuple[Path, Path], tmp_path: Path
) -> None:
    prompts = [word for text in ("a red circle", "two blue stars", "a square") for word in ("--prompt", text)]
    common = ["--pretrained_model_name_or_path", base, "--adapter", probed[0], *prompts, "--seeds", "0-1"]
    common += ["--steps", "2", "--correct", "0.5", *CPU]
    dpt("generate", *common, "--output_dir", tmp_path / "one")
    done = dpt("generate", *common, "--output_dir", tmp_path / "two", processes=2)
    assert done.stdout.count("output: ") == 1
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    want, got = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert len(want) == 6 and want.keys() == got.keys()
    assert all((want[name] - got[name]).abs().max() <= 1 for name in want), "batches differ: the last bit may"
    rows = [
        [json.loads(line) for line in (tmp_path / name / "manifest.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [row["file"] for row in rows[1]] == [f"images/{p:05d}_{s}.png" for p in range(3) for s in (0, 1)]
    for mine, theirs in zip(*rows, strict=True):
        assert mine.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-4)
        assert mine == theirs

    lost = [tmp_path / "two" / rows[1][index]["file"] for index in (1, 4)]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "two" / "images").iterdir() if path not in lost}
    for path in lost:
        path.unlink()
    dpt("generate", *common, "--output_dir", tmp_path / "two", processes=2)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = pictures(tmp_path / "two")
    assert all((want[path.name] - again[path.name]).abs().max() <= 1 for path in lost)
    assert len((tmp_path / "two" / "manifest.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("kind", ["itm", "rec"])
def test_evaluation_is_the_same(base: str, probed: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    common = ["--pretrained_model_name_or_path", base, "--adapter", probed[0], "--resolution", "32"]
    common += ["--val_samples", "5", "--timesteps", "500", *CPU]
    dpt("evaluate", kind, *common, "--output_dir", tmp_path / "one")
    dpt("evaluate", kind, *common, "--output_dir", tmp_path / "two", processes=2)
    name = {"itm": "itm_scores.jsonl", "rec": "rec_ranks.jsonl"}[kind]
    want, got = (
        [json.loads(line) for line in (tmp_path / part / name).read_text().splitlines()] for part in ("one", "two")
    )
    assert len(want) == 5 and files_of(tmp_path / "one") == files_of(tmp_path / "two")
    for mine, theirs in zip(want, got, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
