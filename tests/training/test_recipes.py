"""Both recipes through their public functions, on the tiny model."""

import json
import math
import re

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file

from dpt_t2i.adapter.io import load_adapter
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import LORA_FILE
from dpt_t2i.config import TuneConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.training import probe as probe_module
from dpt_t2i.training import tune as tune_module
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.setup import set_up
from dpt_t2i.training.trackers import read_metrics
from dpt_t2i.training.tune import _tell_unread, run_tune


def weights(folder):
    adapter = load_file(folder / "adapter" / "model.safetensors")
    lora = folder / "pytorch_lora_weights.safetensors"
    return adapter | (load_file(lora) if lora.exists() else {})


def test_probe_then_tune(probe_config, tune_config, base):
    probe = probe_config()
    found = run_probe(probe)
    assert found["validation"].keys() == {"itm_text", "itm_image", "rec_p1", "rec_p5", "rec_p10"}
    first, last = (weights(probe.output_dir / f"checkpoint-{n}") for n in (1, 2))
    assert not [name for name, value in last.items() if torch.equal(value, first[name])], "every parameter learns"

    tune = tune_config(adapter=str(probe.output_dir / "adapter"))
    run_tune(tune)
    tuned = weights(tune.output_dir)
    moved = [name for name, value in last.items() if not torch.equal(value, tuned[name])]
    assert moved == list(last), "stage 2 goes on with the whole adapter"
    assert all(value.abs().max() > 0 for name, value in tuned.items() if ".lora." in name)
    rows = [json.loads(line) for line in (tune.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["val", "train", "val"]
    terms = ("loss_i2t", "loss_t2i", "loss_ce", "loss_bbox", "loss_giou", "loss_align", "loss_mse")
    row = rows[1]
    weighted = [1, 1, 1, 5, 2, 1, 1]
    assert row["loss"] == pytest.approx(sum(w * row[t] for w, t in zip(weighted, terms, strict=True)), rel=1e-4)
    assert (tune.output_dir / "config.yaml").is_file()


def moved_by(run, module, config, monkeypatch):
    """(changed, all) parameter names of everything that the recipe loads, over a run of it."""
    seen = {}

    def watched(config):
        setup = set_up(config)
        pipeline = setup.backbone.pipeline
        seen["parts"] = {
            "denoiser": setup.backbone.denoiser,
            "vae": pipeline.vae,
            "text": pipeline.text_encoder,
            "adapter": setup.adapter,
        }
        seen["before"] = {name: value.clone() for name, value in named(seen["parts"]).items()}
        return setup

    def named(parts):
        # PEFT puts the layers that it adapts one level down
        return {
            f"{part}.{name}".replace(".base_layer.", "."): value.detach()
            for part, module in parts.items()
            for name, value in (*module.named_parameters(), *module.named_buffers())
        }

    monkeypatch.setattr(module, "set_up", watched)
    run(config)
    after = named(seen["parts"])
    fresh = {name for name in after if ".lora_" in name}
    assert after.keys() - fresh == seen["before"].keys()
    moved = {name for name, value in seen["before"].items() if not torch.equal(value, after[name])}
    # A of a fresh LoRA is noise and B is 0: B moved where it is not 0
    moved |= {name for name in fresh if ".lora_A." in name or after[name].abs().max() > 0}
    return moved, set(after)


def test_stage_one_changes_the_adapter_alone_and_stage_two_the_lora_too(probe_config, tune_config, monkeypatch):
    moved, everything = moved_by(run_probe, probe_module, probe_config(), monkeypatch)
    adapter = {name for name in everything if name.startswith("adapter.")}
    assert len(adapter) > 40 and moved == adapter
    assert {name.split(".")[0] for name in everything} == {"adapter", "denoiser", "vae", "text"}

    config = tune_config(adapter=str(probe_config().output_dir), ema_decay=0.5, sample_every=2, sample_steps=1)
    moved, everything = moved_by(run_tune, tune_module, config, monkeypatch)
    lora = {name for name in everything if ".lora_" in name}
    projections = {
        name.removesuffix(".weight")
        for name in everything
        if name.startswith("denoiser.") and re.search(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)\.weight$", name)
    }
    assert lora == {f"{name}.lora_{side}.dpt.weight" for name in projections for side in "AB"}
    assert moved == adapter | lora
    own, average = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in averaged(config.output_dir))
    up = [name for name in own if ".up." in name]
    assert up and all(0 < (average[name].norm() / own[name].norm()) < 1 for name in up), "B grows from 0"
    (sample,) = [row for row in read_metrics(config.output_dir / "metrics.jsonl") if row["split"] == "samples"]
    assert sample["step"] == 2 and sample["lora_norm"] > 0
    assert (config.output_dir / "samples" / "step-000002.png").is_file()


def averaged(run):
    return run, run / "ema"


def test_stage_two_restores_logit_scale(probe_config, tune_config):
    probe = probe_config(max_train_steps=3, learning_rate=1e-2)
    run_probe(probe)
    folder = probe.output_dir / "adapter"
    learned, _ = load_adapter(folder, torch.device("cpu"))
    tune = tune_config(adapter=str(folder), max_train_steps=1, learning_rate=1e-12, adam_weight_decay=0)
    run_tune(tune)
    after, _ = load_adapter(tune.output_dir / "adapter", torch.device("cpu"))
    assert abs(learned.logit_scale.item() - torch.tensor(1 / 0.07).log().item()) > 1e-3
    assert after.logit_scale.item() == pytest.approx(learned.logit_scale.item(), abs=1e-6)


def test_resume_equals_uninterrupted(probe_config):
    straight = probe_config(max_train_steps=4)
    run_probe(straight)
    want = weights(straight.output_dir)
    broken = straight.output_dir.with_name("broken")
    run_probe(probe_config(max_train_steps=2, output_dir=str(broken)))
    run_probe(probe_config(max_train_steps=4, output_dir=str(broken), resume_from_checkpoint="latest"))
    got = weights(broken)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_accumulation_is_the_same_training(probe_config, tmp_path):
    whole = probe_config(train_batch_size=4, output_dir=str(tmp_path / "whole"))
    cut = probe_config(train_batch_size=2, gradient_accumulation_steps=2, output_dir=str(tmp_path / "cut"))
    run_probe(whole)
    run_probe(cut)
    norms = [
        next(row for row in read_metrics(config.output_dir / "metrics.jsonl") if row["split"] == "train")
        for config in (whole, cut)
    ]
    for name in ("loss", "loss_i2t", "loss_giou", "grad_norm"):
        assert norms[0][name] == pytest.approx(norms[1][name], rel=1e-4)


def test_control_arm_trains_only_the_lora(tune_config, base):
    config = tune_config(objective="denoise_only")
    before = load_backbone(base, device="cpu").fingerprint()["weights"]
    run_tune(config)
    lora = load_file(config.output_dir / "pytorch_lora_weights.safetensors")
    assert all(value.abs().max() > 0 for value in lora.values())
    assert not (config.output_dir / "adapter").exists()
    held_out = [row for row in read_metrics(config.output_dir / "metrics.jsonl") if row["split"] == "val"]
    assert [set(row) for row in held_out] == [{"step", "split", "loss_mse"}] * 2
    assert held_out[0]["loss_mse"] != held_out[1]["loss_mse"]
    assert load_backbone(base, device="cpu").fingerprint()["weights"] == before


def test_control_arm_looks_at_no_negatives(tune_config):
    objectives = ("denoise_only", "denoise_itm", "dpt")
    alone = {name: set_up(tune_config(objective=name)).examples.view.alone for name in objectives}
    assert alone == {"denoise_only": True, "denoise_itm": False, "dpt": False}


def test_matching_by_the_error_needs_no_adapter_and_the_next_run_goes_on_from_it(tune_config, probe_config, tmp_path):
    config = tune_config(objective="denoise_itm", denoise_itm_coef=2.0, denoise_itm_min_timestep=0)
    run_tune(config)
    (row,) = [row for row in read_metrics(config.output_dir / "metrics.jsonl") if row["split"] == "train"]
    assert row["loss_denoise_itm"] > 0
    assert row["loss"] == pytest.approx(row["loss_mse"] + 2 * row["loss_denoise_itm"], rel=1e-5)
    assert not (config.output_dir / "adapter").exists()
    probe = probe_config()
    run_probe(probe)
    lora, adapter = str(config.output_dir), str(probe.output_dir)
    then = tune_config(lora=lora, adapter=adapter, denoise_itm_coef=2.0, output_dir=str(tmp_path / "then"))
    run_tune(then)
    before, after = (load_file(run.output_dir / "pytorch_lora_weights.safetensors") for run in (config, then))
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)


@pytest.mark.parametrize(
    ("objective", "weight", "message"),
    [
        ("denoise_only", {"denoise_itm_coef": 1.0}, "leave out denoise_itm_coef"),
        ("denoise_only", {"denoise_dpo_coef": 1.0}, "leave out denoise_itm_coef and denoise_dpo_coef"),
        ("denoise_itm", {}, "needs a denoise_itm_coef or denoise_dpo_coef over 0"),
        ("denoise_only", {"on_policy_fraction": 0.5}, "has no ITM and REC: leave out on_policy_fraction"),
        ("denoise_only", {"lora_itm_rec_share": 0.0}, "has no ITM and REC: leave out lora_itm_rec_share"),
    ],
)
def test_a_weight_that_does_not_go_with_the_objective(tune_config, objective, weight, message):
    with pytest.raises(InputError, match=message):
        run_tune(tune_config(objective=objective, **weight))


def test_settings_that_change_nothing_are_told(tune_config, caplog):
    _tell_unread(tune_config(mse_loss_coef=3.0, denoise_itm_coef=1.0, denoise_itm_min_timestep=0))
    assert caplog.messages == []
    _tell_unread(tune_config(distill_strength=0.5, denoise_itm_min_timestep=0, denoise_dpo_temperature=0.2))
    assert caplog.messages == [
        "distill_coef is 0, so it does not read distill_strength",
        "denoise_itm_coef is 0, so it does not read denoise_itm_min_timestep",
        "denoise_dpo_coef is 0, so it does not read denoise_dpo_temperature",
    ]
    caplog.clear()
    _tell_unread(tune_config(objective="denoise_only", itm_coef=2.0, giou_coef=1.0))
    assert caplog.messages == ["objective denoise_only has no ITM and REC, so it does not read itm_coef, giou_coef"]


def test_preference_alone_is_an_objective(tune_config):
    config = tune_config(objective="denoise_itm", denoise_dpo_coef=2.0, denoise_dpo_min_timestep=0)
    run_tune(config)
    (row,) = [row for row in read_metrics(config.output_dir / "metrics.jsonl") if row["split"] == "train"]
    assert "loss_denoise_itm" not in row
    assert row["loss_denoise_dpo"] == pytest.approx(math.log(2), rel=1e-5)  # a fresh LoRA is the base
    assert row["loss"] == pytest.approx(row["loss_mse"] + 2 * row["loss_denoise_dpo"], rel=1e-5)


def test_on_policy_negatives_run(probe_config):
    config = probe_config(on_policy_fraction=0.5, on_policy_pool=2, max_train_steps=1)
    run_probe(config)
    assert load_file(config.output_dir / "checkpoint-1" / "on_policy.safetensors")["pixels"].shape == (2, 32, 32, 3)


def test_tune_without_an_adapter_is_refused(tune_config):
    with pytest.raises(InputError, match="starts from stage 1"):
        run_tune(tune_config())


def test_detach_unet_feature_is_read(tune_config):
    """Trained on denoising alone, what feeds nothing but the cut map never moves."""
    config = tune_config(objective="denoise_only", detach_unet_feature="up1")
    run_tune(config)
    lora = load_file(config.output_dir / "pytorch_lora_weights.safetensors")
    ups = {name: value for name, value in lora.items() if ".lora.up." in name}
    still = {name for name, value in ups.items() if not value.any()}
    assert still == {
        name for name in ups if name.startswith(("unet.up_blocks.1", "unet.mid_block", "unet.down_blocks.2"))
    }
    with pytest.raises(InputError, match="detach_unet_feature `mid_up1` names 2 blocks; give one"):
        run_tune(tune_config(objective="denoise_only", detach_unet_feature="mid_up1", run_name="two"))


def test_nan_stops_the_run_and_names_step_and_records(probe_config, monkeypatch):
    config = probe_config(max_train_steps=3)
    from dpt_t2i.training import objective

    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        terms = real(*args, **kwargs)
        return {name: value * float("nan") for name, value in terms.items()} if len(calls) == 3 else terms

    real = objective.itm_loss
    monkeypatch.setattr(objective, "itm_loss", poisoned)
    with pytest.raises(InputError, match=r"step 3: the loss is not finite, records \[\d+, \d+\]: .*'loss_i2t': nan"):
        run_probe(config)
    assert (config.output_dir / "checkpoint-2" / "state.json").is_file(), "the last checkpoint is kept"
    batch = load_file(config.output_dir / "nan" / "step-3-rank-0.safetensors")
    assert batch["0.latents"].shape == (6, 4, 8, 8) and batch["0.noise"].shape == (2, 4, 8, 8)
    assert {"0.text.tokens", "0.caption", "0.targets.boxes.0", "0.timesteps"} <= batch.keys()


def test_weights_that_are_not_finite_are_seen_too(probe_config, monkeypatch):
    config = probe_config(max_train_steps=2, on_nan="skip")

    def broken(config):
        setup = set_up(config)
        setup.adapter.logit_scale.data.fill_(float("nan"))
        next(setup.adapter.parameters()).data.fill_(float("nan"))
        setup.validation.records = setup.validation.records[:0]
        monkeypatch.setattr(type(setup.validation), "__call__", lambda self: {})
        return setup

    monkeypatch.setattr(probe_module, "set_up", broken)
    run_probe(config)
    (row,) = [row for row in read_metrics(config.output_dir / "metrics.jsonl") if row["split"] == "train"]
    assert row["skipped"] == 2, "matching boxes to NaN is no crash"


def test_wrong_tap_for_an_adapter_is_named(probe_config, tune_config):
    probe = probe_config(max_train_steps=1)
    run_probe(probe)
    with pytest.raises(InputError, match="reads tap `up1`, the config says `mid`"):
        run_tune(tune_config(adapter=str(probe.output_dir / "adapter"), tap="mid"))


@pytest.mark.parametrize(
    "other, said",
    [
        ({"hidden_dim": 32}, "has hidden_dim 16, this run asks for 32; use its settings"),
        ({"num_queries_rec": 5}, "has num_queries_rec 3, this run asks for 5"),
        ({"tap": "mid"}, "has tap up1, this run asks for mid"),
    ],
)
def test_going_on_with_another_adapter_is_one_line(probe_config, other, said):
    run_probe(probe_config(max_train_steps=1))
    with pytest.raises(InputError, match=said):
        run_probe(probe_config(resume_from_checkpoint="latest", **other))


def test_a_warm_up_that_the_schedule_does_not_have_is_refused(probe_config):
    with pytest.raises(InputError, match="lr_scheduler constant has no warm-up; give --lr_scheduler constant_with"):
        run_probe(probe_config(lr_warmup_steps=10))
    run_probe(probe_config(max_train_steps=1, lr_warmup_steps=10, lr_scheduler="constant_with_warmup"))


def test_a_used_folder_is_not_overwritten(probe_config):
    config = probe_config(max_train_steps=1)
    run_probe(config)
    before = weights(config.output_dir / "checkpoint-1")
    with pytest.raises(InputError, match="holds an earlier run .*resume_from_checkpoint latest"):
        run_probe(probe_config(max_train_steps=1, seed=4))
    assert all(torch.equal(value, before[name]) for name, value in weights(config.output_dir / "checkpoint-1").items())
    assert "seed: 0" in (config.output_dir / "config.yaml").read_text()


def test_a_refused_resume_leaves_the_runs_settings(probe_config):
    config = probe_config(max_train_steps=1)
    run_probe(config)
    before = (config.output_dir / "config.yaml").read_text()
    for changed, message in (
        ({"train_batch_size": 3}, "was written with examples_a_step = .*; use its settings"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "is no checkpoint"),
    ):
        with pytest.raises(InputError, match=message):
            run_probe(probe_config(**{"max_train_steps": 2, "resume_from_checkpoint": "latest"} | changed))
        assert (config.output_dir / "config.yaml").read_text() == before


def test_a_lora_to_go_on_from_brings_its_rank_along(probe_config, tune_config, tmp_path):
    run_probe(probe_config(max_train_steps=1))
    adapter = str(probe_config().output_dir / "adapter")
    few = {"max_train_steps": 1, "adapter": adapter}
    first = tune_config(**few, rank=3, lora_alpha=6.0, output_dir=str(tmp_path / "first"))
    run_tune(first)
    wide = {**few, "lora": str(first.output_dir)}
    for key, asked, found in (("rank", 8, 3), ("lora_alpha", 3.0, 6)):
        with pytest.raises(InputError, match=f"LoRA .*first has {key} {found}, not {asked:g}; leave {key} out"):
            run_tune(tune_config(**wide, output_dir=str(tmp_path / key), **{key: asked}))
        assert not (tmp_path / key / "config.yaml").exists()
    again = tune_config(**wide, output_dir=str(tmp_path / "again"))
    run_tune(again)
    said = build_config(TuneConfig, again.output_dir / "config.yaml").lora
    assert (said.rank, said.lora_alpha, said.lora_scope) == (3, 6.0, "all")
    with pytest.raises(
        InputError, match=r"has layers of its own \(all\), not those of lora_scope to_tap; leave lora_sco"
    ):
        run_tune(tune_config(**few, lora=str(tmp_path / "first"), lora_scope="to_tap", output_dir=str(tmp_path / "x")))
    half = {key: value for key, value in load_file(first.output_dir / LORA_FILE).items() if ".to_q." in key}
    save_file(half, tmp_path / "half.safetensors")  # of layers that no scope has; and once more with all settings
    odd = tune_config(**few, lora=str(tmp_path / "half.safetensors"), output_dir=str(tmp_path / "odd"))
    run_tune(odd)
    more = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    run_tune(build_config(TuneConfig, odd.output_dir / "config.yaml", more))
    onward = {**few, "max_train_steps": 2, "output_dir": str(first.output_dir), "resume_from_checkpoint": "latest"}
    with pytest.raises(InputError, match="checkpoint-1 holds a LoRA of rank 3 and alpha 6, this run asks for 5 and 5"):
        run_tune(tune_config(**onward, rank=5))


def test_gradient_checkpointing_recomputes_and_changes_nothing(probe_config, tune_config, tmp_path, monkeypatch):
    run_probe(probe_config(max_train_steps=1))
    adapter = str(probe_config().output_dir)
    passes = []
    real = ResnetBlock2D.forward

    def counted(self, *args, **kwargs):
        passes[-1] += torch.is_grad_enabled()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    for name, on in (("plain", False), ("checkpointed", True)):
        passes.append(0)
        folder = str(tmp_path / name)
        run_tune(tune_config(adapter=adapter, max_train_steps=1, gradient_checkpointing=on, output_dir=folder))
    assert passes[1] > 1.5 * passes[0], "each block is run again on the way back"
    plain, checkpointed = weights(tmp_path / "plain"), weights(tmp_path / "checkpointed")
    assert all(torch.allclose(checkpointed[name], value, atol=1e-6) for name, value in plain.items())
