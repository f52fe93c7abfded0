"""`dpt import-official` on the release's own checkpoint, end to end."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from dpt_t2i import cli
from dpt_t2i.sampling.model import load_model
from tests.parity.golden import SHARED, close, needs_shared, tensors

pytestmark = needs_shared
FLAGS = ["--base", str(SHARED / "sd"), "--nheads", "4", "--text_encoder_type", str(SHARED / "roberta"), "--json"]


@torch.no_grad()
def test_the_released_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["import-official", str(SHARED / "checkpoint" / "pytorch_model.bin"), "--out", str(tmp_path), *FLAGS]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    keys = json.loads((SHARED / "checkpoint" / "keys.json").read_text())["keys"]
    assert {row["key"] for row in result["table"] if row["action"] == "taken"} == set(keys)
    assert result["counts"] == {"taken": len(keys), "ignored": 0, "missing": 1} and result["stage"] == 2
    golden, heads = tensors("features"), tensors("adapter")
    model = load_model(str(SHARED / "sd"), str(tmp_path), str(tmp_path / "adapter"), device="cpu")
    assert model.scorer is not None
    text = model.backbone.encode_text(["a red dog on the left of a blue chair", "the second bus from the left"])
    output = model.scorer.read(golden["noisy_latents"], golden["timesteps"], text)
    close(output.match_embeds, heads["up1.q_emb_matching"][0])
    close(output.boxes, heads["up1.pred_boxes"])
    stock = StableDiffusionPipeline.from_pretrained(SHARED / "sd")
    stock.load_lora_weights(tmp_path)
    noise = stock.unet(golden["noisy_latents"], golden["timesteps"], golden["encoder_hidden_states"]).sample
    close(noise, golden["lora.noise_pred"])


def test_a_checkpoint_with_a_tuned_roberta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the release's `--no_freeze_text_encoder` writes it: the golden RoBERTa with every weight doubled."""
    state = torch.load(SHARED / "checkpoint" / "pytorch_model.bin", weights_only=True)
    roberta = {key: 2 * value for key, value in load_file(SHARED / "roberta" / "model.safetensors").items()
               if value.is_floating_point()}  # fmt: skip
    tuned = {f"text_encoder.{key.removeprefix('roberta.')}": value for key, value in roberta.items()}
    torch.save(state | tuned, tmp_path / "pytorch_model.bin")
    out = tmp_path / "out"
    assert cli.main(["import-official", str(tmp_path), "--out", str(out), *FLAGS]) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert {row["key"] for row in table} == set(state | tuned)
    written = load_file(out / "adapter" / "grounding_text" / "model.safetensors")
    assert all(torch.equal(written[key.removeprefix("roberta.")], value) for key, value in roberta.items())


@pytest.mark.parametrize("base", ["bundled"])
def test_another_base_is_one_line(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["import-official", str(SHARED / "checkpoint"), "--base", base, "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "bundled" in message and not (tmp_path / "out").exists()
