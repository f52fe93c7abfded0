"""The card: its front matter, its numbers, and nothing that was not measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from dpt_t2i.config import ProbeConfig, TrainDataConfig, TrainModelConfig, TuneConfig, save_config
from dpt_t2i.errors import InputError
from dpt_t2i.publish import model_card
from dpt_t2i.publish.base_model import BaseModel
from dpt_t2i.publish.model_card import _correction_flags, write_export_card, write_model_card


@pytest.fixture(autouse=True)
def bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """No base is read: a folder's name is its last part, as ever."""

    def look(name: str, revision: str | None) -> BaseModel:
        return base_model(Path(name).name if Path(name).exists() else name)

    monkeypatch.setattr(model_card, "look_at_base", look)


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


def base_model(name: str, pipeline_class: str = "StableDiffusionPipeline", key: str = "unet") -> BaseModel:
    return BaseModel(Path(name), name, pipeline_class, key, nn.Identity(), {}, "epsilon", (512, 512))


def exported(folder: Path, base: BaseModel, *files: str, **measured: Any) -> tuple[dict[str, Any], str]:
    """The card of an export whose folder holds `files`."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        correction = {"correct": 0.02, "correction_rule": "relative"}
        (folder / file).write_text(json.dumps({"metadata": {"correction": correction}}))
    config = TuneConfig().model_dump(mode="json")
    text = write_export_card(folder, "My model", base, config, "openrail++", **measured).read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_an_export_for_comfyui_and_a1111(tmp_path: Path) -> None:
    files = ("my.safetensors", "adapter/config.json")
    front, body = exported(tmp_path / "out", base_model("someone/model"), *files)
    assert (front["base_model"], front["base_model_relation"]) == ("someone/model", "adapter")
    assert front["license"] == "openrail++" and "lora" in front["tags"]
    assert "# My model" in body and "`<lora:my:1>`" in body and "models/loras" in body
    assert 'weight_name="my.safetensors"' in body
    base = "--pretrained_model_name_or_path someone/model"
    assert f"{base} --lora out/my.safetensors --adapter out/adapter --correct 0.02 --correction_rule relative" in body
    assert 'DiscriminativeAdapter.from_pretrained("out/adapter")' in body
    assert "%" not in body  # nothing was measured


def test_an_export_for_diffusers_shows_the_path_of_a_base_that_is_no_hub_id(tmp_path: Path) -> None:
    front, body = exported(tmp_path / "out", base_model("my-base"), "pytorch_lora_weights.safetensors")
    assert "base_model" not in front
    assert 'base = "path/to/my-base"' in body and 'load_lora_weights("out", weight_name="pytorch_lora' in body
    assert "dpt export --pretrained_model_name_or_path path/to/my-base --lora out --format kohya" in body
    assert "--adapter" not in body  # there is none
    _, bundled = exported(tmp_path / "two", base_model("bundled"), "pytorch_lora_weights.safetensors")
    assert 'base = str(files("dpt_t2i") / "bundled" / "base")' in bundled and "--pretrained_model" not in bundled


def test_a_dit_family_needs_no_second_file_and_pixart_has_no_loader(tmp_path: Path) -> None:
    lora = "pytorch_lora_weights.safetensors"
    _, flux = exported(tmp_path / "flux", base_model("black/flux", "FluxPipeline", "transformer"), lora)
    assert "ComfyUI reads these `transformer.` keys itself" in flux and "load_lora_weights" in flux
    assert "--format kohya" not in flux
    _, pixart = exported(tmp_path / "pixart", base_model("p/sigma", "PixArtSigmaPipeline", "transformer"), lora)
    assert "has no `load_lora_weights`" in pixart and "--format merged" in pixart and "pipe.load_lora" not in pixart


def test_a_merged_model_is_a_finetune(tmp_path: Path) -> None:
    files = ("model_index.json", "dpt/probe/adapter/config.json")
    front, body = exported(tmp_path / "out", base_model("someone/model"), *files)
    assert front["base_model_relation"] == "finetune" and "lora" not in front["tags"]
    assert 'from_pretrained("out")' in body and "pipe.load_lora" not in body and "--lora" not in body
    assert "--pretrained_model_name_or_path out --correct 0.02" in body


def test_the_command_has_all_of_the_stored_correction() -> None:
    stored = {"correct": 0.07, "correction_rule": "relative", "correction_end": 0.5, "correction_every": 1}
    assert _correction_flags(stored) == " --correct 0.07 --correction_rule relative --correction_end 0.5"
    assert _correction_flags({}) == " --correct 0.05 --correction_rule relative"
    assert _correction_flags({"correct": 1.0, "correction_fused": True}) == " --correct 1.0 --correction_fused"


def test_paths_of_settings_are_cut(tmp_path: Path) -> None:
    save_config(TuneConfig(data=TrainDataConfig(dataset="/home/secret/pictures")), tmp_path / "config.yaml")
    _, body = card_of(tmp_path)
    assert "| `data.dataset` | pictures |" in body and "secret" not in body


@pytest.mark.parametrize(
    ("objective", "said"), [("denoise_only", "denoising loss alone"), ("denoise_itm", "from what is almost right")]
)
def test_a_lora_without_an_adapter_says_so(tmp_path: Path, objective: str, said: str) -> None:
    save_config(TuneConfig(objective=objective), tmp_path / "config.yaml")  # type: ignore[arg-type]
    _, body = card_of(tmp_path)
    assert said in body and "--correct" not in body


def test_a_run_that_went_on_with_other_settings_says_so(tmp_path: Path) -> None:
    save_config(ProbeConfig(), tmp_path / "config.yaml")
    assert "other settings" not in card_of(tmp_path)[1]
    save_config(ProbeConfig(seed=1), tmp_path / "config.before.yaml")
    assert "began with; those of before: `config.before.yaml`" in card_of(tmp_path)[1]


@pytest.mark.parametrize("content", [None, "[1, 2", "just text", "model: 3"])
def test_what_is_no_run_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(InputError, match="config.yaml"):
        write_model_card(tmp_path)
