"""A correction must reach the final image whole, whatever the sampler remembers."""

import diffusers
import pytest
import torch

from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.sampling.loop import sample
from dpt_t2i.sampling.schedulers import input_scale, make_scheduler, move_state
from tests.sampling.stubs import NOISE, ConstantNoise, states

SAMPLERS = ("ddim", "euler", "dpm++", "unipc")
SHIFT = torch.zeros(1, 4, 8, 8)
SHIFT[0, 1, 2, 3] = 0.25


def final(name: str, strength: float, start: float = 0.0, end: float = 1.0, every: int = 1) -> torch.Tensor:
    """Final latents when the correction adds `strength * SHIFT` to the denoiser's input."""
    correction = CorrectionConfig(correct=strength, correction_start=start, correction_end=end, correction_every=every)
    settings = SampleConfig(steps=10, guidance_scale=3.0, scheduler=name)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scorer = lambda z, t, text: (z * SHIFT).flatten(1).sum(1)  # noqa: E731
    return sample(ConstantNoise(), states(1), states(1), noise, settings, correction, scorer)


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_correction_the_constant_noise_is_solved_exactly(name):
    backbone = ConstantNoise()
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    schedule = make_scheduler(backbone, name, 10)
    alpha = backbone.pipeline.scheduler.alphas_cumprod[int(schedule.timesteps[0])]
    z = alpha.sqrt() * clean + (1 - alpha).sqrt() * NOISE
    start = z / input_scale(schedule, schedule.timesteps[0]) / schedule.init_noise_sigma
    made = sample(backbone, states(1), states(1), start, SampleConfig(steps=10, scheduler=name), CorrectionConfig())
    torch.testing.assert_close(made, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("step", [0, 1, 4, 9])
def test_a_shift_at_one_step_arrives_as_the_shift_of_the_clean_image(name, step):
    # z = a z_0 + s NOISE with the noise fixed: moving z by d moves z_0 by d / a, and nothing after changes that.
    moved = final(name, 1.0, start=step / 10, end=(step + 0.5) / 10) - final(name, 0.0)
    schedule = make_scheduler(ConstantNoise(), name, 10)
    alpha = ConstantNoise().pipeline.scheduler.alphas_cumprod[int(schedule.timesteps[step])]
    expected = SHIFT / alpha.sqrt()
    torch.testing.assert_close(moved, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_shifts_at_every_step_add_up(name):
    moved = final(name, 1.0, every=2) - final(name, 0.0)
    schedule = make_scheduler(ConstantNoise(), name, 10)
    alphas = ConstantNoise().pipeline.scheduler.alphas_cumprod[schedule.timesteps[::2].long()]
    torch.testing.assert_close(moved, SHIFT * alphas.rsqrt().sum(), rtol=2e-3, atol=2e-3)


def test_pixels_are_never_clipped_in_latent_space():
    backbone = ConstantNoise()
    config = dict(backbone.pipeline.scheduler.config)
    del config["clip_sample"]
    backbone.pipeline.scheduler = type(backbone.pipeline.scheduler)(**{k: v for k, v in config.items() if k[0] != "_"})
    assert backbone.pipeline.scheduler.config.clip_sample  # diffusers' default, right for pixels only
    assert not make_scheduler(backbone, "ddim", 5).config.clip_sample


def test_input_scale_is_that_of_the_sampler():
    backbone = ConstantNoise()
    euler = make_scheduler(backbone, "euler", 10)
    first = euler.timesteps[0]
    scale = input_scale(euler, first)
    torch.testing.assert_close(scale, 1 / (euler.sigmas[0] ** 2 + 1).sqrt())
    assert float(input_scale(make_scheduler(backbone, "ddim", 10), torch.tensor(901))) == 1.0


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(**FLOW),
        diffusers.DPMSolverMultistepScheduler(**FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_shift_arrives_whole_in_flow_matching(scheduler):
    # z = (1 - sigma) z_0 + sigma NOISE with the noise fixed, so the velocity NOISE - z_0 is (NOISE - z) / (1 - sigma).
    def run(shift_at: int | None) -> torch.Tensor:
        scheduler.set_timesteps(10)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for index, timestep in enumerate(scheduler.timesteps):
            if index == shift_at:
                latents = move_state(scheduler, latents, latents + SHIFT, timestep)
            velocity = (NOISE - latents) / (1 - scheduler.sigmas[index]).clamp(min=1e-2)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    moved = run(4) - run(None)
    torch.testing.assert_close(moved, SHIFT / (1 - scheduler.sigmas[4]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [diffusers.DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler])
def test_a_shift_survives_samplers_that_add_noise(kind):
    backbone = ConstantNoise()
    latent = {"clip_sample": False} if kind is diffusers.DDPMScheduler else {}
    scheduler = kind.from_config(backbone.pipeline.scheduler.config, **latent)

    def run(shift_at: int | None) -> torch.Tensor:
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            z = scheduler.scale_model_input(latents, timestep)
            if index == shift_at:
                latents = move_state(scheduler, latents, z + SHIFT, timestep)
                z = z + SHIFT
            # A perfect denoiser of a single picture would undo any shift: this one knows the noise, not the picture.
            latents = scheduler.step(NOISE, timestep, latents, generator=generator, return_dict=False)[0]
        return latents

    moved = run(4) - run(None)
    alpha = backbone.pipeline.scheduler.alphas_cumprod[int(scheduler.timesteps[4])]
    torch.testing.assert_close(moved, SHIFT / alpha.sqrt(), rtol=2e-3, atol=2e-3)


def test_dpm_plus_plus_is_itself_on_a_base_that_samples_by_its_relatives():
    """DEIS' config would be refused by it, and `sde-dpmsolver++` would draw noise that follows from no seed."""
    backbone = ConstantNoise()
    plain = make_scheduler(backbone, "dpm++", 4)
    relatives = (
        diffusers.DEISMultistepScheduler.from_config(backbone.pipeline.scheduler.config),
        diffusers.DPMSolverMultistepScheduler.from_config(
            backbone.pipeline.scheduler.config, algorithm_type="sde-dpmsolver++"
        ),
    )
    for scheduler in relatives:
        backbone.pipeline.scheduler = scheduler
        made = make_scheduler(backbone, "dpm++", 4)
        assert made.config.algorithm_type == plain.config.algorithm_type == "dpmsolver++"
        moved = [made.step(NOISE, made.timesteps[0], torch.ones(1, 4, 8, 8)).prev_sample]
        again = make_scheduler(backbone, "dpm++", 4)
        moved.append(again.step(NOISE, again.timesteps[0], torch.ones(1, 4, 8, 8)).prev_sample)
        assert torch.equal(*moved)
