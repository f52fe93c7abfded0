"""One process or two: the same training, the same images, the same figures, and one voice."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dpt_t2i.data.cache import KEYS
from dpt_t2i.data.examples import _order
from dpt_t2i.scenes.commands import export_scenes
from tests.e2e.launching import CPU, TINY, dpt, error_lines, files_of, launch, launch_all
from tests.tiny import tiny_pipeline

pytestmark = pytest.mark.slow
RATE = 1e-3
LOST = {"00000_1.png", "00002_0.png"}
TRAIN = [*TINY, "--max_train_steps", "3", "--learning_rate", str(RATE), "--gradient_accumulation_steps", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def probed(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 on one process, with twice the batch of the two."""
    folder = tmp_path_factory.mktemp("probe") / "one"
    dpt("probe", "--pretrained_model_name_or_path", base, *TRAIN, "--train_batch_size", "4", "--output_dir", folder)
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in rows]


def assert_alike(mine: dict[str, Any], theirs: dict[str, Any], **tolerance: float) -> None:
    """Words and counts are equal, measured numbers nearly so."""
    measured = {key for key, value in mine.items() if isinstance(value, float)}
    assert {key: mine[key] for key in mine.keys() - measured} == {key: theirs[key] for key in theirs.keys() - measured}
    for key in measured:
        assert mine[key] == pytest.approx(theirs[key], **tolerance), key


def assert_same_run(one: Path, two: Path) -> None:
    """Same files, figures and weights, up to the order in which numbers are added."""
    assert files_of(one) == files_of(two)
    for mine, theirs in zip(metrics(one), metrics(two), strict=True):
        assert_alike(mine, theirs, rel=2e-3, abs=1e-5)
    for file in one.rglob("*.safetensors"):
        if file.name == "optimizer.safetensors":
            continue
        want, got = load_file(file), load_file(two / file.relative_to(one))
        assert want.keys() == got.keys()
        far = {name: float((want[name] - got[name]).abs().max()) for name in want}
        # AdamW moves each number by about the rate a step: a lost example or share would show as that.
        assert max(far.values()) < 0.1 * RATE, max(far, key=lambda name: far[name])


def test_probing_is_the_same(base: str, probed: Path, tmp_path: Path) -> None:
    model = ["--pretrained_model_name_or_path", base]
    launch("probe", *model, *TRAIN, "--train_batch_size", "2", "--output_dir", tmp_path, processes=2)
    assert_same_run(probed, tmp_path)


def test_tuning_is_the_same(base: str, probed: Path, tmp_path: Path) -> None:
    common = ["--pretrained_model_name_or_path", base, *TRAIN, "--gradient_checkpointing", "--qformer_ckpt", probed]
    dpt("tune", *common, "--train_batch_size", "4", "--output_dir", tmp_path / "one")
    launch("tune", *common, "--train_batch_size", "2", "--output_dir", tmp_path / "two", processes=2)
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
    done = launch("probe", *common, "--train_batch_size", "1", "--output_dir", tmp_path, processes=2, expect=None)
    assert time.monotonic() - start < 600, "the other process does not wait for the lost one"
    (line,) = error_lines(done)
    assert line.startswith(f"error: step 1: cannot read image {broken}: ") and line.endswith(
        "replace or remove the file"
    )
    assert not (tmp_path / "adapter").exists()


def test_bad_input_that_all_meet_is_told_once(tmp_path: Path) -> None:
    done = launch("probe", "--lerning_rate=1", processes=2, expect=None)
    assert error_lines(done) == ["error: unknown option `--lerning_rate`; did you mean `--learning_rate`?"]


@pytest.fixture(scope="module")
def made(base: str, probed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one/`, `two/` by one and two processes; `resumed/` by two where four of six images of `one` were there."""
    folder = tmp_path_factory.mktemp("made")
    model = ["--pretrained_model_name_or_path", base, "--adapter", probed, *CPU]
    prompts = [word for text in ("a red circle", "two blue stars", "a square") for word in ("--prompt", text)]
    images = ["generate", *model, *prompts, "--seeds", "0-1", "--steps", "2", "--correct", "0.5"]
    figures = [*model, "--resolution", "32", "--val_samples", "5", "--timesteps", "500"]

    def commands(name: str) -> list[list[str | Path]]:
        return [
            [*images, "--output_dir", folder / name],
            *(["evaluate", kind, *figures, "--output_dir", folder / name / kind] for kind in ("itm", "rec")),
        ]

    for command in commands("one"):
        dpt(*command)
    shutil.copytree(folder / "one" / "images", folder / "resumed" / "images")
    for lost in LOST:
        (folder / "resumed" / "images" / lost).unlink()
    resume = [*images, "--output_dir", folder / "resumed"]
    launch_all([*commands("two"), resume], processes=2, script=folder / "commands.py")
    return folder


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in (folder / "images").iterdir()}


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_processes_make_the_images_that_one_makes(made: Path) -> None:
    assert files_of(made / "one") == files_of(made / "two")
    want, got = pictures(made / "one"), pictures(made / "two")
    assert len(want) == 6 and want.keys() == got.keys()
    assert all(np.abs(want[name] - got[name]).max() <= 1 for name in want), "batches differ: the last bit may"
    mine, theirs = (rows_of(made / name / "manifest.jsonl") for name in ("one", "two"))
    assert [row["file"] for row in theirs] == [f"images/{p:05d}_{s}.png" for p in range(3) for s in (0, 1)]
    for a, b in zip(mine, theirs, strict=True):
        assert a.pop("score") == pytest.approx(b.pop("score"), abs=1e-4)
        assert a == b


def test_two_processes_go_on_image_by_image(made: Path) -> None:
    want, got = pictures(made / "one"), pictures(made / "resumed")
    assert want.keys() == got.keys()
    assert all(np.abs(want[name] - got[name]).max() <= 1 for name in want)
    begun = (made / "commands.py").stat().st_mtime
    fresh = {path.name for path in (made / "resumed" / "images").iterdir() if path.stat().st_mtime > begun}
    assert fresh == LOST, "what was there is kept"
    assert len(rows_of(made / "resumed" / "manifest.jsonl")) == 6


@pytest.mark.parametrize("file", ["itm/itm_scores.jsonl", "rec/rec_ranks.jsonl"])
def test_two_processes_measure_what_one_measures(made: Path, file: str) -> None:
    want, got = (rows_of(made / name / file) for name in ("one", "two"))
    assert len(want) == 5
    for mine, theirs in zip(want, got, strict=True):
        assert_alike(mine, theirs, abs=1e-4)


def rows_by_key(folder: Path) -> dict[bytes, dict[str, torch.Tensor]]:
    """Every row of a cache, of which none may be there twice."""
    found: dict[bytes, dict[str, torch.Tensor]] = {}
    for file in folder.rglob("*.safetensors"):
        columns = load_file(file)
        keys = [key.numpy().tobytes() for key in columns.pop(KEYS)]
        assert len(set(keys)) == len(keys) and not found.keys() & set(keys), "encoded twice"
        found |= {key: {name: part[row] for name, part in columns.items()} for row, key in enumerate(keys)}
    return found


def test_two_processes_fill_the_cache_that_one_fills(base: str, tmp_path: Path) -> None:
    export_scenes(tmp_path / "data", n=26, seed=2, size=40)
    common = ["--pretrained_model_name_or_path", base, *CPU, "--dataset", tmp_path / "data", "--val_samples", "2"]
    common += ["--resolution", "32", "--random_flip", "--block_size", "2", "--cache_dtype", "float32", "--cache_dir"]
    dpt("data", "cache", *common, tmp_path / "one")
    done = launch("data", "cache", *common, tmp_path / "two", "--json", processes=2)
    want, got = rows_by_key(tmp_path / "one"), rows_by_key(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two") and want.keys() == got.keys()
    for key, row in want.items():
        torch.testing.assert_close(got[key], row, rtol=1e-4, atol=1e-5)
    one, two = (
        {str(file.relative_to(folder)): load_file(file)[KEYS].tolist() for file in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two, "what is in a block depends on who came first"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    told = json.loads(line)
    assert told["records"] == 24 and told["images"] + told["texts"] == len(want)
    # Who comes late on a busy machine finds fewer blocks left, of one kind perhaps none.
    assert len(told["by_process"]) == 2 and all(images + texts for images, texts in told["by_process"]), "both worked"
    assert told["images_encoded"] == told["images"] > 2 * 24, "each picture once"
    assert told["texts_encoded"] == told["texts"] > 2 * 24, "each text once, though many stand in several blocks"
