"""Commands that end with a page: an alignment with its report, a run of training with its card."""

import pytest

from dpt_t2i.backbones.lora import add_lora, save_lora
from dpt_t2i.config import AlignmentConfig, ProbeConfig, TuneConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.report import evaluate_alignment, probe, tune
from tests.tiny import tiny_backbone, tiny_pipeline


def test_the_numbers_and_the_page(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    backbone = tiny_backbone()
    add_lora(backbone, 2)
    save_lora(backbone, tmp_path / "control", {})
    settings = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "arms": ("base", "control"),
        "max_prompts": 2,
        "seeds": "0",
        "steps": 1,
        "device": "cpu",
        "bootstrap_draws": 10,
        "control_lora": tmp_path / "control",
        "output_dir": tmp_path / "out",
    }
    (tmp_path / "control" / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss_mse": 0.5}\n' * 2)
    result = evaluate_alignment(build_config(AlignmentConfig, overrides=settings))
    page = (tmp_path / "out" / "report.html").read_text()
    assert result["summary"][-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert result["prompts"] == 2 and "the plain model" in page
    assert "Run control: losses" in page, "the curves of the run folder that a LoRA came from"
    assert "one prompt tells no spread" in page and result["warnings"][0] in page


def test_both_stages_leave_a_card_in_their_run_folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    common = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "device": "cpu",
        "max_train_steps": 1,
        "train_batch_size": 2,
        "val_samples": 2,
        "hidden_dim": 16,
        "num_heads": 2,
        "dim_feedforward": 16,
    }
    probe(build_config(ProbeConfig, overrides=common | {"output_dir": tmp_path / "probe"}))
    more = {"adapter": str(tmp_path / "probe"), "output_dir": tmp_path / "tune", "sample_every": 0}
    tune(build_config(TuneConfig, overrides=common | more | {"gradient_accumulation_steps": 1}))
    written = build_config(TuneConfig, tmp_path / "tune" / "config.yaml")
    assert written.model.tap == "up1"  # nobody gave it: the paper's, and then that of the adapter
    cards = {stage: (tmp_path / stage / "README.md").read_text() for stage in ("probe", "tune")}
    assert "load_lora_weights" in cards["tune"] and "load_lora_weights" not in cards["probe"]
    assert all("| `seed` | 0 |" in card and str(tmp_path) not in card for card in cards.values())

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own")
    with pytest.raises(InputError, match="README.md is none of our cards"):  # before anything is trained
        probe(build_config(ProbeConfig, overrides=common | {"output_dir": tmp_path / "mine"}))
