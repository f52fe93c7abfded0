"""The card: its front matter, its numbers, and nothing that was not measured."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpt_t2i.config import ProbeConfig, TrainModelConfig, TuneConfig, save_config
from dpt_t2i.errors import InputError
from dpt_t2i.publish.model_card import write_model_card


def card_of(run: Path, **measured: Any) -> tuple[dict[str, Any], str]:
    text = write_model_card(run, **measured).read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_tuned_model_with_measurements(tmp_path: Path, alignment: dict[str, Any]) -> None:
    run = tmp_path / "my-run"
    model = TrainModelConfig(pretrained_model_name_or_path="someone/some-model")
    save_config(TuneConfig(model=model, seed=11), run / "config.yaml")
    share = {"accuracy": 0.875}
    itm = {"examples": 64, "timesteps": {"500": {"text": share}}, "versions": {}}
    rec = {"examples": 64, "timesteps": {"500": {f"precision@{k}": {"accuracy": k / 16} for k in (1, 5, 10)}}}
    front, body = card_of(run, alignment=alignment, itm=itm, rec=rec)
    assert front["base_model"] == "someone/some-model" and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "diffusers" and {"lora", "text-to-image"} <= set(front["tags"])
    assert "# my-run" in body and "| `lora.rank` | 4 |" in body and "| `seed` | 11 |" in body
    lines = body.splitlines()
    assert "| arm | overall | two objects | counting |" in lines
    assert lines[lines.index("| arm | overall | two objects | counting |") + 1] == "|---|---|---|---|"
    assert "| dpt | 75.0 | 100.0 | 50.0 |" in lines and "| random | 41.7 | 33.3 | 50.0 |" in lines
    assert "- dpt-base: +12.3 points (95 % interval +5.0 to +20.0)" in lines
    assert "| 500 | 87.5 |  |" in lines and "| 500 | 6.2 | 31.2 | 62.5 |" in lines
    assert "Made with torch 2.0." in body


def test_a_probe_without_measurements_claims_none(tmp_path: Path) -> None:
    base = tmp_path / "private" / "my-base"
    base.mkdir(parents=True)
    model = TrainModelConfig(pretrained_model_name_or_path=str(base))
    save_config(ProbeConfig(model=model), tmp_path / "run" / "config.yaml")
    front, body = card_of(tmp_path / "run")
    assert "base_model" not in front and "lora" not in front["tags"]
    assert "`my-base`" in body and "private" not in body and "load_lora_weights" not in body
    assert "obey" not in body and "Grounding" not in body and "Made with" not in body and "%" not in body


def test_a_control_says_so(tmp_path: Path) -> None:
    save_config(TuneConfig(objective="denoise_only"), tmp_path / "config.yaml")
    _, body = card_of(tmp_path)
    assert "denoising loss alone" in body and "--correct" not in body


@pytest.mark.parametrize("content", [None, "[1, 2", "just text", "model: 3"])
def test_what_is_no_run_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match="config.yaml"):
        write_model_card(tmp_path)
