import json
import logging

import pytest
import torch

from dpt_t2i.backbones.fingerprint import check_fingerprint, config_hash, lora_hash, weights_hash
from dpt_t2i.backbones.lora import add_lora, remove_lora
from dpt_t2i.errors import InputError
from tests.tiny import tiny_backbone


def test_weights_are_told_apart_and_dtype_and_lora_are_not():
    one, other = tiny_backbone(seed=0), tiny_backbone(seed=1)
    plain = weights_hash(one.denoiser)
    assert plain == weights_hash(tiny_backbone(seed=0).denoiser) != weights_hash(other.denoiser)
    assert weights_hash(tiny_backbone(seed=0).denoiser.to(torch.bfloat16)) == plain
    add_lora(one, rank=2)
    assert weights_hash(one.denoiser) == plain


def test_the_schedule_and_the_scale_of_latents_have_a_hash_of_their_own():
    pipeline = tiny_backbone().pipeline
    before = config_hash(pipeline)
    assert config_hash(tiny_backbone().pipeline) == before
    pipeline.scheduler.config["_name_or_path"] = "moved"
    assert config_hash(pipeline) == before
    for change in ({"beta_end": 0.02}, {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}):
        other = tiny_backbone().pipeline
        other.scheduler = type(other.scheduler).from_config(other.scheduler.config, **change)
        assert config_hash(other) != before, change
    other = tiny_backbone().pipeline
    other.vae.register_to_config(scaling_factor=0.5)
    assert config_hash(other) != before


def test_a_lora_has_its_own_exact_hash():
    backbone = tiny_backbone()
    assert lora_hash(backbone.denoiser) is None
    parameters = add_lora(backbone, rank=2)
    before = lora_hash(backbone.denoiser)
    with torch.no_grad():
        parameters[0][0, 0] += 1e-6
    assert lora_hash(backbone.denoiser) not in (None, before)
    remove_lora(backbone)
    assert lora_hash(backbone.denoiser) is None


def test_fingerprint_is_json_and_names_widths_text_and_prediction_type():
    fingerprint = tiny_backbone("v_prediction").fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    architecture = fingerprint["architecture"]
    assert architecture["block_out_channels"] == [8, 16, 24, 32]
    assert (architecture["text_width"], architecture["prediction_type"]) == (32, "v_prediction")


def test_same_base_under_another_name_is_silent(caplog):
    fingerprint = tiny_backbone().fingerprint()
    check_fingerprint({**fingerprint, "name": "moved"}, fingerprint, "LoRA x")
    assert not caplog.records


def test_other_weights_are_a_warning_and_another_architecture_an_error_both_name_both(caplog):
    mine, fine_tuned = tiny_backbone(seed=0).fingerprint(), tiny_backbone(seed=1).fingerprint()
    with caplog.at_level(logging.WARNING):
        check_fingerprint(mine, fine_tuned, "LoRA x")
    assert len(caplog.records) == 1
    assert all(part in caplog.text for part in ("LoRA x", "tiny-0", "tiny-1", mine["weights"], fine_tuned["weights"]))
    other = tiny_backbone("v_prediction", seed=1).fingerprint()
    with pytest.raises(
        InputError, match="LoRA x.*tiny-0.*prediction_type epsilon.*tiny-1.*prediction_type v_prediction"
    ):
        check_fingerprint(mine, other, "LoRA x")


def test_float16_rounds_other_bits_away_so_that_nothing_is_warned_of(caplog):
    made_for = tiny_backbone().fingerprint()
    backbone = tiny_backbone()
    for part in (backbone.denoiser, backbone.pipeline.vae, backbone.pipeline.text_encoder):
        part.to(torch.float16)
    actual = backbone.fingerprint()
    assert actual["weights"] != made_for["weights"] and actual["dtype"] == "float16"
    caplog.set_level(logging.INFO)
    for one, other in ((made_for, actual), (actual, made_for)):  # trained in it, or used in it
        caplog.clear()
        check_fingerprint(one, other, "adapter x")
        (record,) = caplog.records
        assert record.levelno == logging.INFO and "is not known: float16 rounds" in record.getMessage()
    caplog.clear()
    check_fingerprint(actual, actual, "adapter x")
    assert not caplog.records


def test_another_vae_or_text_encoder_is_a_warning_that_names_the_part(caplog):
    mine, other = tiny_backbone(), tiny_backbone()
    assert set(mine.fingerprint()["parts"]) == {"vae", "text_encoder"}
    with torch.no_grad():
        next(other.pipeline.vae.parameters()).add_(1)
    check_fingerprint(mine.fingerprint(), other.fingerprint(), "LoRA x")
    (record,) = caplog.records
    hashes = [one.fingerprint()["parts"]["vae"] for one in (mine, other)]
    assert hashes[0] != hashes[1] and all(f"(vae {digest})" in record.getMessage() for digest in hashes)
    caplog.clear()
    old = {key: value for key, value in mine.fingerprint().items() if key != "parts"}  # of before parts were hashed
    check_fingerprint(old, other.fingerprint(), "LoRA x")
    assert not caplog.records


def test_what_is_no_fingerprint_is_an_input_error():
    with pytest.raises(InputError, match="adapter x does not say which base"):
        check_fingerprint({}, tiny_backbone().fingerprint(), "adapter x")


def test_a_compiled_denoiser_is_the_same_base():
    backbone = tiny_backbone()
    plain = weights_hash(backbone.denoiser), lora_hash(backbone.denoiser)
    compiled = torch.compile(backbone.denoiser)  # at its first call; none here
    assert (weights_hash(compiled), lora_hash(compiled)) == plain


def test_a_lora_has_one_hash_under_any_name_and_two_have_another():
    def layer(*names):
        module = torch.nn.Module()
        module.lora_A = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(2)) for name in names})
        return torch.nn.ModuleDict({"to_q": module})

    assert lora_hash(layer("dpt")) == lora_hash(layer("default_0")) != lora_hash(layer("dpt", "default_0"))
    assert lora_hash(torch.nn.Linear(1, 1)) is None
