"""Both stages from every data format, 20 steps each, through the real commands on the tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dpt_t2i.cli import main
from dpt_t2i.scenes.commands import export_scenes
from dpt_t2i.training.trackers import read_metrics
from tests.data import writers
from tests.e2e.launching import TINY, dpt
from tests.tiny import tiny_pipeline


def native(folder: Path) -> list[str]:
    export_scenes(folder, n=14)
    return ["--dataset", str(folder)]


def shapes(folder: Path) -> list[str]:
    """Every second picture at the left of a wider one: boxes stay where they are."""
    export_scenes(folder, n=14)
    for path in sorted(folder.glob("*.png"))[::2]:
        scene = Image.open(path).convert("RGB")
        wide = Image.new("RGB", (2 * scene.width, scene.height))
        wide.paste(scene)
        wide.save(path)
    return ["--dataset", str(folder), "--aspect_buckets"]


def huggingface(folder: Path) -> list[str]:
    pytest.importorskip("datasets")
    export_scenes(folder, n=14)
    return ["--dataset", str(folder), "--data_format", "huggingface"]


def foreign(form: str, write: Callable[..., Path]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        write(writers.scenes(14), folder)
        return ["--dataset", str(folder), "--data_format", form]

    return make


def refcoco(folder: Path) -> list[str]:
    writers.write_refcoco(writers.scenes(20), folder, ("train", "val", "train", "testA"))
    return ["--dataset", str(folder), "--data_format", "refcoco"]


def streamed(folder: Path) -> list[str]:
    writers.write_shards(writers.scenes(14), folder, shards=4)
    return ["--dataset", str(folder), "--data_format", "webdataset", "--streaming", "--dataloader_num_workers", "2"]


FORMATS: dict[str, Callable[[Path], list[str]]] = {
    "imagefolder": native,
    "shapes": shapes,
    "huggingface": huggingface,
    "coco": foreign("coco", writers.write_coco),
    "refcoco": refcoco,
    "mdetr": foreign("mdetr", writers.write_mdetr),
    "release": foreign("hard_negatives", writers.write_release_tsv),
    "release_folder": foreign("hard_negatives", writers.write_release_folder),
    "webdataset": foreign("webdataset", writers.write_shards),
    "streamed": streamed,
}
STEPS = 20


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_probe_and_tune_run(form: str, tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    sizes = TINY[: TINY.index("--max_samples")]  # a stream cannot count its records
    common = ["--pretrained_model_name_or_path", tmp_path / "base", *sizes, *FORMATS[form](tmp_path / "data")]
    common += ["--max_train_steps", STEPS, "--train_batch_size", 2, "--gradient_accumulation_steps", 1]
    probe, tune = tmp_path / "probe", tmp_path / "tune"
    dpt("probe", *common, "--output_dir", probe)
    dpt("tune", *common, "--adapter", probe, "--output_dir", tune)
    for folder in (probe, tune):
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "train"]
        assert rows[-1]["step"] == STEPS
        grounded = sum(row["loss_bbox"] for row in rows)
        assert grounded == 0 if form.startswith("release") else grounded > 0, "without expressions grounding is masked"


def test_a_broken_record_is_exit_code_2_unless_it_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    data = FORMATS["release"](tmp_path / "data")
    (tmp_path / "data" / "images" / writers.file_name(3)).unlink()
    line = ["probe", "--pretrained_model_name_or_path", str(tmp_path / "base"), *TINY, *data]
    line += ["--max_train_steps", "1", "--train_batch_size", "2", "--output_dir"]
    assert main([*line, str(tmp_path / "a")]) == 2
    told = capsys.readouterr().err
    assert "row 3:" in told and "does not exist" in told and "Traceback" not in told
    assert main([*line, str(tmp_path / "b"), "--on_bad", "skip"]) == 0
