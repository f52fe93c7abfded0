"""`dpt evaluate alignment` ends with a page."""

from dpt_t2i.backbones.lora import add_lora, save_lora
from dpt_t2i.config import AlignmentConfig, build_config
from dpt_t2i.report import evaluate_alignment
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
