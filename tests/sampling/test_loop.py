"""The loop against stock diffusers with the correction off, and the two modes of the correction by hand."""

import diffusers
import pytest
import torch

from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.loop import Step, eta_of, is_corrected, sample
from dpt_t2i.sampling.noise import initial_noise
from tests.sampling.stubs import ConstantNoise, states
from tests.tiny import tiny_backbone

STOCK = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
OFF = CorrectionConfig()


def mean_of_latent(z, t, text):
    return z.flatten(1).mean(1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", list(STOCK))
def test_uncorrected_images_are_those_of_the_stock_pipeline(name, prediction_type):
    backbone = tiny_backbone(prediction_type)
    prompts = ["a red circle", "two blue stars"]
    noise = torch.stack([initial_noise(seed, (4, 8, 8)) for seed in (0, 1)])
    settings = SampleConfig(steps=6, guidance_scale=4.0, scheduler=name, negative_prompt="left")
    text, null = backbone.encode_text(prompts), backbone.encode_text(["left"] * 2)
    ours = sample(backbone, text, null, noise, settings, OFF)
    pipeline = backbone.pipeline
    pipeline.scheduler = STOCK[name].from_config(pipeline.scheduler.config)
    theirs = pipeline(
        prompts, num_inference_steps=6, guidance_scale=4.0, negative_prompt=["left"] * 2, latents=noise,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "dpm++", "unipc"])
def test_eta_is_ddims_alone(name):
    settings = SampleConfig(steps=2, scheduler=name, eta=0.5)
    with pytest.raises(InputError, match="`eta` 0.5 is DDIM's, and this samples by .*; set `eta` to 0"):
        sample(ConstantNoise(), states(1), states(1), torch.zeros(1, 4, 8, 8), settings, OFF)


def test_eta_is_the_bases_own_where_nobody_says():
    backbone = ConstantNoise()
    backbone.eta = 0.6
    said = [eta_of(backbone, SampleConfig(**how)) for how in ({}, {"eta": 0.0}, {"scheduler": "euler"})]
    assert said == [0.6, 0.0, 0.0]


def test_guidance_1_needs_no_unconditional_pass():
    backbone = ConstantNoise()
    settings = SampleConfig(steps=3, guidance_scale=1.0)
    sample(backbone, states(2), states(2), torch.zeros(2, 4, 8, 8), settings, OFF)
    assert [len(z) for z in backbone.seen] == [2, 2, 2]
    backbone.seen.clear()
    sample(backbone, states(2), states(2), torch.zeros(2, 4, 8, 8), SampleConfig(steps=3), OFF)
    assert [len(z) for z in backbone.seen] == [4, 4, 4]


def test_guidance_behind_its_interval_is_off_as_in_a_stock_pipeline_with_dynamic_guidance():
    backbone = tiny_backbone()
    prompts = ["a red circle", "two blue stars"]
    noise = torch.stack([initial_noise(seed, (4, 8, 8)) for seed in (0, 1)])
    settings = SampleConfig(steps=4, guidance_scale=3.0, guidance_end=0.5)
    ours = sample(backbone, backbone.encode_text(prompts), backbone.encode_text(["", ""]), noise, settings, OFF)

    def off_after_two_steps(pipeline, index, timestep, kwargs):
        if index == 1:
            pipeline._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
        return kwargs

    theirs = backbone.pipeline(
        prompts, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="latent",
        callback_on_step_end=off_after_two_steps, callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_guided_part_that_ends_before_it_begins_is_refused():
    settings = SampleConfig(steps=2, guidance_start=0.6, guidance_end=0.5)
    with pytest.raises(InputError, match="guidance_start 0.6 lies behind guidance_end 0.5"):
        sample(ConstantNoise(), states(1), states(1), torch.zeros(1, 4, 8, 8), settings, OFF)


def test_a_guided_part_without_a_step_is_refused():
    settings, noise = SampleConfig(steps=4, guidance_start=0.8), torch.zeros(1, 4, 8, 8)
    with pytest.raises(InputError, match="of 4 steps none is guided between 0.8 and 1; .*guidance_scale to 1"):
        sample(ConstantNoise(), states(1), states(1), noise, settings, OFF)
    backbone = ConstantNoise()
    sample(backbone, states(1), states(1), noise, settings.model_copy(update={"guidance_scale": 1.0}), OFF)
    assert [len(z) for z in backbone.seen] == [1] * 4


def test_outside_its_interval_guidance_takes_no_unconditional_pass():
    backbone = ConstantNoise()
    backbone.guidance_interval = (0.2, 1.0)  # the base's own, where nobody says
    for given, passes in (({}, [2, 4, 4, 4]), ({"guidance_end": 0.75}, [2, 4, 4, 2]), ({"guidance_start": 0}, [4] * 4)):
        backbone.seen.clear()
        settings = SampleConfig(steps=4, **given)
        sample(backbone, states(2), states(2), torch.zeros(2, 4, 8, 8), settings, OFF)
        assert [len(z) for z in backbone.seen] == passes


@pytest.mark.parametrize("mode", ["state", "noise"])
def test_which_branch_sees_the_corrected_latent(mode):
    backbone = ConstantNoise()
    noise = initial_noise(0, (1, 4, 8, 8))
    correction = CorrectionConfig(correct=256.0, correction_mode=mode, correction_end=0.2)
    final = sample(backbone, states(1), states(1), noise, SampleConfig(steps=3), correction, mean_of_latent)
    unconditional, conditional = backbone.seen[0]
    corrected = noise[0] + 256.0 / 256  # the gradient of a mean over 4 * 8 * 8 values
    torch.testing.assert_close(conditional, corrected)
    torch.testing.assert_close(unconditional, corrected if mode == "state" else noise[0])
    # The denoiser's answer does not depend on z here: in mode `noise` nothing but its input has changed.
    plain = sample(ConstantNoise(), states(1), states(1), noise, SampleConfig(steps=3), OFF)
    assert torch.equal(final, plain) == (mode == "noise")


def test_ddim_and_euler_agree_on_the_corrected_states():
    correction = CorrectionConfig(correct=50.0)
    inputs = {}
    for name in ("ddim", "euler"):
        backbone = tiny_backbone()
        seen = []

        def watch(z, t, text, seen=seen):
            seen.append(z.detach().clone())
            return (z**2).flatten(1).mean(1)

        text = backbone.encode_text(["a red circle"])
        noise = initial_noise(0, (1, 4, 8, 8))
        sample(backbone, text, backbone.null_text(1), noise, SampleConfig(steps=5, scheduler=name), correction, watch)
        inputs[name] = seen
    assert len(inputs["ddim"]) == 5
    for ddim, euler in zip(inputs["ddim"], inputs["euler"], strict=True):
        torch.testing.assert_close(ddim, euler, rtol=1e-5, atol=1e-5 * float(ddim.abs().max()))


def test_start_end_and_every():
    correction = CorrectionConfig(correct=1.0, correction_start=0.2, correction_end=0.7, correction_every=2)
    assert [index for index in range(10) if is_corrected(index, 10, correction)] == [2, 4, 6]
    everywhere = CorrectionConfig(correct=1.0)
    assert all(is_corrected(index, 7, everywhere) for index in range(7))
    assert not any(is_corrected(index, 7, OFF) for index in range(7))


def test_each_step_is_reported_with_the_scores_before_its_correction():
    steps: list[Step] = []
    noise = initial_noise(0, (2, 4, 8, 8))
    correction = CorrectionConfig(correct=1.0, correction_every=2)
    settings = SampleConfig(steps=4)
    final = sample(ConstantNoise(), states(2), states(2), noise, settings, correction, mean_of_latent, steps.append)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.timestep for step in steps] == [751.0, 501.0, 251.0, 1.0]
    assert [step.scores is None for step in steps] == [False, True, False, True]
    torch.testing.assert_close(steps[0].scores, noise.flatten(1).mean(1))
    assert torch.equal(steps[-1].latents, final)


def test_a_correction_without_a_scorer_is_refused():
    with pytest.raises(InputError, match="needs an adapter"):
        sample(
            ConstantNoise(), states(1), states(1), torch.zeros(1, 4, 8, 8), SampleConfig(steps=2),
            CorrectionConfig(correct=0.1),
        )  # fmt: skip


def test_sampling_leaves_the_callers_gradient_mode_and_the_pipelines_scheduler_alone():
    backbone = ConstantNoise()
    before = backbone.pipeline.scheduler
    sample(backbone, states(1), states(1), torch.zeros(1, 4, 8, 8), SampleConfig(steps=2), OFF)
    assert torch.is_grad_enabled()
    assert backbone.pipeline.scheduler is before and before.num_inference_steps is None


def test_as_many_negative_prompts_as_prompts():
    with pytest.raises(InputError, match="2 latents, 2 prompts and 1 negative prompts do not go together"):
        sample(ConstantNoise(), states(2), states(1), torch.zeros(2, 4, 8, 8), SampleConfig(steps=2), OFF)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_less_than_1_is_no_guidance_as_in_a_stock_pipeline(scale):
    """SD-Turbo and its like are called with 0, and must still obey their prompt."""
    backbone, noise = tiny_backbone(), torch.stack([initial_noise(seed, (4, 8, 8)) for seed in (0, 1)])
    prompts = ["a red circle", "two blue stars"]
    text, null = backbone.encode_text(prompts), backbone.null_text(2)
    ours = sample(backbone, text, null, noise, SampleConfig(steps=3, guidance_scale=scale), OFF)
    backbone.pipeline.scheduler = diffusers.DDIMScheduler.from_config(backbone.pipeline.scheduler.config)
    call = {"num_inference_steps": 3, "guidance_scale": scale, "latents": noise, "output_type": "latent"}
    torch.testing.assert_close(ours, backbone.pipeline(prompts, **call).images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("start", "end"), [(0.9, 0.1), (0.5, 0.5)])
def test_a_correction_of_no_step_is_refused(start, end):
    backbone = tiny_backbone()
    correction = CorrectionConfig(correct=0.1, correction_start=start, correction_end=end)
    noise, settings = initial_noise(0, (4, 8, 8))[None], SampleConfig(steps=2)
    with pytest.raises(InputError, match="is not before correction_end .*: no step would be corrected"):
        sample(backbone, states(1), states(1), noise, settings, correction, mean_of_latent)
    late = CorrectionConfig(correct=0.1, correction_start=0.95)
    with pytest.raises(InputError, match="of 2 steps none is corrected between 0.95 and 1; widen that part"):
        sample(backbone, states(1), states(1), noise, settings, late, mean_of_latent)
