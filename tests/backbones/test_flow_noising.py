import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from dpt_t2i.backbones.flow_noising import FLOW, FlowNoising, flow_noising, resolution_shift
from dpt_t2i.errors import InputError

LATENTS = torch.full((2, 1, 1, 1), 2.0)
NOISE = torch.full((2, 1, 1, 1), 10.0)


def test_by_hand():
    noising = FlowNoising(1000)
    timesteps = torch.tensor([250, 500])
    # 0.75 * 2 + 0.25 * 10 and 0.5 * 2 + 0.5 * 10
    torch.testing.assert_close(noising.add_noise(LATENTS, NOISE, timesteps).flatten(), torch.tensor([4.0, 6.0]))
    assert torch.equal(noising.target(LATENTS, NOISE, timesteps), torch.full((2, 1, 1, 1), 8.0))
    torch.testing.assert_close(noising.snr(timesteps), torch.tensor([9.0, 1.0]))  # (0.75 / 0.25)^2, (0.5 / 0.5)^2
    assert noising.prediction_type == FLOW


def test_both_ends_and_fractions():
    noising = FlowNoising(1000)
    ends = noising.add_noise(LATENTS, NOISE, torch.tensor([0.0, 1000.0])).flatten()
    assert ends.tolist() == [2.0, 10.0]
    assert noising.snr(torch.tensor([0.0, 1000.0])).tolist() == [float("inf"), 0.0]
    assert float(noising.add_noise(LATENTS[:1], NOISE[:1], torch.tensor([2.5]))) == pytest.approx(2.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_diffusers_at_the_timesteps_that_the_denoiser_sees(shift):
    # The shift moves the schedule; a timestep means the same noise whatever the shift is.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(7)
    latents, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    timesteps = scheduler.timesteps[[1, 5]]
    ours = flow_noising(scheduler, "a").add_noise(latents, noise, timesteps)
    torch.testing.assert_close(ours, scheduler.scale_noise(latents, timesteps, noise))


def test_the_target_leads_from_noise_to_image():
    noising = FlowNoising(1000)
    latents, noise, t = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4), torch.tensor([700.0])
    z = noising.add_noise(latents, noise, t)
    torch.testing.assert_close(z - 0.7 * noising.target(latents, noise, t), latents)


def test_the_shift_of_a_resolution_is_diffusers_own():
    config = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    assert resolution_shift(config, 64, 64) == pytest.approx(1.15)
    assert resolution_shift({}, 32, 48) == pytest.approx(calculate_shift(32 * 48))


def test_another_scheduler_is_refused():
    with pytest.raises(InputError, match="base `a`: DDIMScheduler is no scheduler of flow matching"):
        flow_noising(DDIMScheduler(), "a")


def test_samplers_of_diffusion_that_are_told_to_sample_flows():
    for options in ({"use_flow_sigmas": True}, {"prediction_type": FLOW}):
        assert flow_noising(UniPCMultistepScheduler(**options), "a") == FlowNoising(1000)
    with pytest.raises(InputError, match="base `a`: UniPCMultistepScheduler is no scheduler of flow matching"):
        flow_noising(UniPCMultistepScheduler(), "a")
