"""A tiny model on disk and settings small enough for a CPU's seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpt_t2i.config import ProbeConfig, TuneConfig, build_config
from tests.tiny import tiny_pipeline

SMALL = {
    "resolution": 32,
    "val_samples": 4,
    "max_samples": 50,
    "hidden_dim": 16,
    "num_heads": 2,
    "dim_feedforward": 16,
    "num_queries_matching": 2,
    "num_queries_rec": 3,
    "dropout": 0.0,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "checkpointing_steps": 1,
    "validation_steps": 100,
    "learning_rate": 1e-3,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def probe_config(base: Path, tmp_path: Path) -> Callable[..., ProbeConfig]:
    def make(**overrides: Any) -> ProbeConfig:
        defaults = {"pretrained_model_name_or_path": str(base), "output_dir": str(tmp_path / "probe")}
        return build_config(ProbeConfig, overrides=SMALL | defaults | overrides)

    return make


@pytest.fixture
def tune_config(base: Path, tmp_path: Path) -> Callable[..., TuneConfig]:
    def make(**overrides: Any) -> TuneConfig:
        defaults = {"pretrained_model_name_or_path": str(base), "output_dir": str(tmp_path / "tune"), "sample_every": 0}
        return build_config(TuneConfig, overrides=SMALL | defaults | overrides)

    return make
