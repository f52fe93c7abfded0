"""What both recipes begin with: the adapter that is restored, the sizes that follow from the model, what is refused."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from dpt_t2i.adapter.io import load_adapter, read_adapter_card
from dpt_t2i.backbones import parts
from dpt_t2i.backbones.fingerprint import lora_hash
from dpt_t2i.backbones.lora import add_lora, load_lora, save_lora
from dpt_t2i.config import ProbeConfig, build_config
from dpt_t2i.errors import InputError
from dpt_t2i.training import setup
from dpt_t2i.training.probe import result, run_probe
from dpt_t2i.training.setup import set_up, store_adapter, write_config
from tests.data import writers

CPU = torch.device("cpu")


def test_an_adapter_comes_back_whole_and_with_its_metadata(probe_config, tmp_path):
    first = set_up(probe_config())
    with torch.no_grad():
        first.adapter.logit_scale.fill_(3.21)
    folder = tmp_path / "adapter"
    store_adapter(first, folder, stage="probe", best=0.5)
    again = set_up(probe_config(adapter=str(folder), seed=9, hidden_dim=32))
    assert again.adapter.logit_scale.item() == pytest.approx(3.21)
    assert again.adapter.logit_scale.requires_grad
    want, got = first.adapter.state_dict(), again.adapter.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], value) for name, value in want.items())
    assert again.adapter.config.hidden_dim == 16, "its own sizes count, not the config's"
    assert again.adapter_metadata == {"stage": "probe", "best": 0.5}
    store_adapter(again, tmp_path / "next", stage="tune")
    assert load_adapter(tmp_path / "next", CPU)[1] == {"stage": "tune", "best": 0.5}


def test_an_adapter_remembers_the_lora_that_it_was_trained_with(probe_config, tmp_path):
    setup = set_up(probe_config())
    store_adapter(setup, tmp_path / "probe")
    assert read_adapter_card(tmp_path / "probe")["base"]["lora"] is None
    for number, parameter in enumerate(add_lora(setup.backbone, 2, 3.0)):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    store_adapter(setup, tmp_path / "tuned" / "adapter")
    save_lora(setup.backbone, tmp_path / "tuned", {})
    remembered = read_adapter_card(tmp_path / "tuned" / "adapter")["base"]["lora"]
    reader = set_up(probe_config(output_dir=str(tmp_path / "other"))).backbone
    load_lora(reader, tmp_path / "tuned")
    assert remembered == lora_hash(reader.denoiser) is not None


def test_a_new_adapters_weights_follow_from_the_seed(probe_config):
    def weights(seed: int, before: int) -> torch.Tensor:
        torch.manual_seed(before)  # whatever was drawn before does not matter
        setup = set_up(probe_config(seed=seed))
        assert setup.adapter_metadata == {}
        return torch.cat([value.flatten() for value in setup.adapter.state_dict().values()])

    first = weights(3, before=1)
    assert torch.equal(first, weights(3, before=2))
    assert not torch.equal(first, weights(4, before=1))


@pytest.mark.parametrize(("low", "high"), [(501, 500), (0, 1000)])  # the model has 0..999
def test_timesteps_that_cannot_be_drawn_are_refused(probe_config, low, high):
    with pytest.raises(InputError, match=f"timesteps {low} to {high}: min_timestep must not be above max_timestep"):
        set_up(probe_config(min_timestep=low, max_timestep=high))


def test_one_timestep_is_a_range(probe_config):
    set_up(probe_config(min_timestep=999, max_timestep=999))


@pytest.mark.parametrize(("asked", "side"), [(None, 32), (16, 16)])
def test_the_resolution_is_the_models_own_unless_asked(probe_config, asked, side):
    setup = set_up(probe_config(resolution=asked, val_samples=3))  # 8 latent pixels of 4 image pixels each
    assert setup.examples[0].pixels.shape == (3, side, side)
    assert setup.examples.records[0].load_image().size == (side, side)
    assert [example.pixels.shape for example in setup.validation.examples] == [(3, side, side)] * 3


def test_training_and_validation_are_different_splits(probe_config):
    setup = set_up(probe_config(val_samples=2, max_samples=5, data_seed=4))
    assert [record.id for record in setup.examples.records] == [f"train-4-{i:06d}" for i in range(5)]
    assert [example.id for example in setup.validation.examples] == ["scenes/val-4-000000", "scenes/val-4-000001"]


@pytest.mark.parametrize("name", ["denoise_itm", "denoise_dpo", "distill"])
def test_a_loss_that_no_timestep_reaches_is_refused(tune_config, name):
    asked = {f"{name}_coef": 1.0, f"{name}_min_timestep": 800, "max_timestep": 799}
    with pytest.raises(InputError, match=f"{name}_min_timestep 800 is above max_timestep 799: that loss would be 0"):
        set_up(tune_config(**asked))
    set_up(tune_config(**asked | {f"{name}_coef": 0.0}))


def test_sizes_that_the_adapter_to_start_from_does_not_have_are_told(probe_config, tmp_path, caplog):
    store_adapter(set_up(probe_config()), tmp_path / "adapter")
    set_up(probe_config(adapter=str(tmp_path)))
    assert "is not used" not in caplog.text
    set_up(probe_config(adapter=str(tmp_path), hidden_dim=64))
    assert "hidden_dim 64 is not used: the adapter to start from has 16" in caplog.text


def test_the_run_folder_says_how_it_was_made(probe_config):
    config = probe_config(learning_rate=3e-5, seed=11, tap="mid")
    write_config(set_up(config).config)
    assert build_config(ProbeConfig, config.output_dir / "config.yaml") == config


def test_without_a_tap_that_of_the_adapter_to_start_from_is_read(probe_config, tmp_path):
    assert set_up(probe_config()).config.model.tap == "up1"
    store_adapter(set_up(probe_config(tap="mid_up2")), tmp_path / "adapter")
    again = set_up(probe_config(adapter=str(tmp_path)))
    assert [tap.name for tap in again.taps] == ["mid", "up2"] and again.config.model.tap == "mid_up2"


def test_gradient_checkpointing_reaches_the_denoiser(probe_config):
    assert set_up(probe_config(gradient_checkpointing=True)).backbone.denoiser.is_gradient_checkpointing
    assert not set_up(probe_config()).backbone.denoiser.is_gradient_checkpointing


def test_attention_runs_in_fused_kernels_with_the_flag_and_without(probe_config, caplog):
    caplog.set_level("INFO", logger="dpt_t2i")
    for asked in (False, True):
        denoiser = set_up(probe_config(enable_xformers_memory_efficient_attention=asked)).backbone.denoiser
        assert {type(p).__name__ for p in denoiser.attn_processors.values()} == {"AttnProcessor2_0"}
        assert ("xformers is not used" in caplog.text) is asked


def test_a_caption_encoder_of_another_width_is_named(probe_config, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    store_adapter(set_up(probe_config()), folder)
    card = json.loads((folder / "config.json").read_text())
    card["adapter"]["grounding_text"] = "my/roberta"
    (folder / "config.json").write_text(json.dumps(card))
    monkeypatch.setattr(setup, "load_grounding_text", lambda name, device: SimpleNamespace(text_dim=48))
    with pytest.raises(InputError, match="expressions of width 32, grounding_text `my/roberta` gives 48"):
        set_up(probe_config(adapter=str(folder)))


def test_crop_and_flip_reach_the_examples(probe_config):
    plain = set_up(probe_config()).examples
    asked = set_up(probe_config(center_crop=False, random_flip=True)).examples
    assert (plain.view.center_crop, plain.view.random_flip) == (True, False)
    assert (asked.view.center_crop, asked.view.random_flip) == (False, True)


def test_shapes_are_sorted_by_steps_of_all_processes(probe_config, caplog):
    caplog.set_level(logging.INFO)
    wanted = {"aspect_buckets": True, "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_samples": 8}
    buckets = set_up(probe_config(**wanted)).examples.buckets
    assert buckets.step == 6 and len(buckets) == 12 and buckets.counts() == {(32, 32): 8}
    assert "aspect buckets: 8 of 32 x 32" in caplog.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"aspect_buckets": True, "cache_dir": "."}, "a cache holds squares"),
        ({"aspect_buckets": True, "on_policy_fraction": 0.5}, "on_policy_fraction does not go with .*aspect_buckets"),
        ({"streaming": True, "aspect_buckets": True}, "aspect_buckets does not go with streamed shards"),
        ({"streaming": True, "on_policy_fraction": 0.5}, "on_policy_fraction does not go with streamed shards"),
        ({"streaming": True, "dataloader_num_workers": 3}, "cannot be dealt out to 3 streams"),
    ],
)
def test_what_does_not_go_together_is_one_line(probe_config, tmp_path, settings, says):
    if "streaming" in settings:
        shards = writers.write_shards(writers.scenes(6), tmp_path / "shards", shards=3)
        settings = settings | {"dataset": str(shards), "data_format": "webdataset", "max_samples": None}
    with pytest.raises(InputError, match=says):
        run_probe(probe_config(**settings))


def test_deepspeed_is_refused(probe_config, monkeypatch):
    kind = DistributedType.DEEPSPEED
    monkeypatch.setattr(setup, "Accelerator", lambda **_: SimpleNamespace(distributed_type=kind))
    with pytest.raises(InputError, match="DEEPSPEED cuts up what is trained, .* --config_file configs/fsdp.yaml"):
        setup.make_accelerator(probe_config())


def test_the_bases_hashes_are_read_once(probe_config, monkeypatch):
    backbone = set_up(probe_config()).backbone
    before = backbone.fingerprint()
    monkeypatch.setattr(parts, "weights_hash", lambda _: pytest.fail("read again"))
    add_lora(backbone, 2)
    assert backbone.fingerprint() == before and len(before["weights"]) == 16


def test_a_runs_name_is_its_folder(probe_config):
    config = probe_config(run_name="mine")
    write_config(set_up(config).config)
    assert (config.output_dir / "mine" / "config.yaml").is_file()
    assert not (config.output_dir / "config.yaml").exists()


def test_a_run_that_goes_on_otherwise_says_so_and_keeps_what_was(probe_config, caplog):
    first = probe_config(learning_rate=1e-4)
    write_config(first)
    write_config(probe_config(learning_rate=1e-4, resume_from_checkpoint="latest"))
    file = first.folder / "config.yaml"
    assert not caplog.records and not (first.folder / "config.before.yaml").exists()
    write_config(probe_config(learning_rate=1e-2, itm_coef=9, resume_from_checkpoint="latest"))
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "goes on with loss.itm_coef 9.0, which was 1.0",
        "goes on with train.learning_rate 0.01, which was 0.0001",
    ]
    assert "learning_rate: 0.0001" in (first.folder / "config.before.yaml").read_text()
    assert "learning_rate: 0.01" in file.read_text()
    file.write_text("{broken")
    write_config(probe_config(resume_from_checkpoint="latest"))
    assert "learning_rate" in file.read_text()


def test_a_run_without_held_out_figures_says_so(tmp_path):
    assert result(tmp_path, {}, None)["summary"] == ["no held-out figure"]
    assert result(tmp_path, {"itm_text": 0.5}, None)["summary"] == ["held-out, t = 500:", "itm_text   0.500"]
    told = result(tmp_path, {"itm_text": 0.5, "loss_mse": 0.25}, None)["summary"]
    assert told[0] == "held-out, t = 500 (loss_mse over all noise levels):"


def test_a_best_checkpoint_that_is_gone_is_not_named(tmp_path):
    rows = [{"step": step, "split": "val", "itm_text": merit} for step, merit in ((2, 0.9), (4, 0.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert result(tmp_path, {}, None)["summary"][-1] == "best checkpoint: step 2, which is not kept"
    (tmp_path / "checkpoint-2").mkdir()
    assert result(tmp_path, {}, None)["summary"][-1] == "best checkpoint: checkpoint-2"


def test_what_a_finished_run_made_is_not_overwritten(probe_config):
    config = probe_config()
    (config.folder / "adapter").mkdir(parents=True)
    set_up(config)  # no figures: not a run's
    (config.folder / "metrics.jsonl").write_text("")
    for resume in (None, "latest"):
        with pytest.raises(InputError, match=r"holds what an earlier run made \(adapter\), and no checkpoint to go on"):
            set_up(probe_config(resume_from_checkpoint=resume))


def test_what_differs_from_the_run_whose_checkpoint_is_gone_on_from_is_told(probe_config, tmp_path, caplog):
    first = probe_config(learning_rate=1e-4)
    write_config(first)
    (first.folder / "checkpoint-3").mkdir()
    far = {"resume_from_checkpoint": str(first.folder / "checkpoint-3"), "output_dir": str(tmp_path / "far")}
    write_config(probe_config(learning_rate=1e-4, **far))
    assert not caplog.records
    write_config(probe_config(learning_rate=1e-2, **far))
    assert [r.getMessage() for r in caplog.records] == ["goes on with train.learning_rate 0.01, which was 0.0001"]


def test_fp16_on_a_cpu_is_refused(probe_config):
    with pytest.raises(InputError, match="mixed_precision fp16 needs a GPU.*--mixed_precision bf16"):
        set_up(probe_config(mixed_precision="fp16"))
