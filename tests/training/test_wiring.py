"""Every setting of a stage reaches the part that it is for: what a run hands to the engine, under unlike settings."""

import pytest

from dpt_t2i.training import probe as probe_module
from dpt_t2i.training import tune as tune_module
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.tune import run_tune

LOSS = {
    "itm_coef": 1.5,
    "ce_coef": 2.5,
    "bbox_coef": 3.5,
    "giou_coef": 4.5,
    "align_coef": 5.5,
    "eos_coef": 0.3,
    "align_temperature": 0.2,
    "on_policy_fraction": 0.5,
    "on_policy_every": 3,
    "on_policy_pool": 4,
    "on_policy_steps": 5,
    "on_policy_guidance": 6.0,
    "on_policy_eta": 0.7,
}
DENOISE = {
    "mse_loss_coef": 6.5,
    "snr_gamma": 4.0,
    "caption_dropout": 0.3,
    "detach_unet_feature": "mid",
    "denoise_itm_coef": 7.5,
    "denoise_itm_temperature": 0.15,
    "denoise_itm_min_timestep": 310,
    "denoise_dpo_coef": 8.5,
    "denoise_dpo_temperature": 0.25,
    "denoise_dpo_min_timestep": 320,
}


class Handed(Exception):
    """In place of the training: the job that the engine would get."""


def job_of(run, module, config, monkeypatch):
    def hand(job, accelerator):
        raise Handed(job)

    monkeypatch.setattr(module, "train", hand)
    with pytest.raises(Handed) as handed:
        run(config)
    return handed.value.args[0]


def assert_loss(job, objective):
    assert {name: getattr(objective.loss, name) for name in LOSS} == LOSS
    terms = ("loss_i2t", "loss_t2i", "loss_ce", "loss_bbox", "loss_giou", "loss_align")
    assert [job.weights[term] for term in terms] == [1.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    pool = job.feed.refresh
    assert pool is not None and pool.loss == objective.loss and pool.examples is job.feed.examples and pool.seed == 9


def test_stage_one(probe_config, monkeypatch):
    config = probe_config(seed=9, data_seed=4, lr_scheduler="linear", **LOSS)
    job = job_of(run_probe, probe_module, config, monkeypatch)
    assert_loss(job, job.objective)
    assert job.clipped_apart == [job.objective.adapter] and job.output_dir == config.output_dir
    assert (job.feed.seed, job.feed.data.data_seed, job.feed.train) == (9, 4, config.train)
    assert job.feed.caption_dropout == 0, "stage 1 drops none"


def test_stage_two(probe_config, tune_config, monkeypatch):
    run_probe(probe_config(max_train_steps=1))
    config = tune_config(
        adapter=str(probe_config().output_dir),
        seed=9,
        lora_itm_rec_share=0.25,
        lora_scope="to_tap",
        rank=3,
        lora_alpha=5.0,
        sample_every=7,
        sample_prompts=("a star", "two stars"),
        sample_steps=6,
        sample_guidance=2.5,
        sample_eta=0.6,
        sample_correct=0.4,
        distill_coef=9.5,
        distill_strength=0.35,
        distill_min_timestep=410,
        **LOSS,
        **DENOISE,
    )
    job = job_of(run_tune, tune_module, config, monkeypatch)
    objective = job.objective
    assert_loss(job, objective)
    rest = [job.weights[f"loss_{term}"] for term in ("mse", "denoise_itm", "denoise_dpo", "distill")]
    assert rest == [6.5, 7.5, 8.5, 9.5]
    assert {name: getattr(objective.denoise, name) for name in DENOISE} == DENOISE
    assert (objective.share, objective.cut.name, job.feed.caption_dropout) == (0.25, "mid", 0.3)
    assert objective.teacher.config == config.distill
    lora = {name for name, _ in objective.named_parameters() if ".lora_" in name}
    assert lora and not [name for name in lora if ".up_blocks.2" in name or ".up_blocks.3" in name], "up to `up1`"
    assert {objective.get_parameter(name).shape[0] for name in lora if ".lora_A." in name} == {3}
    drawn = job.sample
    assert [job.prompt for job in drawn.jobs] == ["a star", "two stars"] and job.sample_every == 7
    how = drawn.settings
    assert (how.steps, how.guidance_scale, how.eta, drawn.strength) == (6, 2.5, 0.6, 0.4)


@pytest.mark.parametrize("objective", ["denoise_only", "denoise_itm"])
def test_without_an_adapter(tune_config, monkeypatch, objective):
    coefficients = {"denoise_itm_coef": 0.0, "denoise_dpo_coef": 0.0} if objective == "denoise_only" else {}
    denoise = DENOISE | coefficients
    job = job_of(run_tune, tune_module, tune_config(objective=objective, **denoise), monkeypatch)
    assert {name: getattr(job.objective.denoise, name) for name in denoise} == denoise
    assert (job.objective.cut.name, job.feed.caption_dropout, job.feed.refresh) == ("mid", 0.3, None)
