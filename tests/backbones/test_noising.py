import pytest
import torch
from diffusers import DDPMScheduler

from dpt_t2i.backbones.noising import Noising
from dpt_t2i.errors import InputError

LATENTS = torch.full((2, 1, 1, 1), 2.0)
NOISE = torch.full((2, 1, 1, 1), 10.0)
TIMESTEPS = torch.tensor([0, 1])


def noising(prediction_type: str) -> Noising:
    return Noising(torch.tensor([0.64, 0.36]), prediction_type)  # signal 0.8 and 0.6, sigma 0.6 and 0.8


def test_by_hand():
    # 0.8 * 2 + 0.6 * 10 and 0.6 * 2 + 0.8 * 10
    torch.testing.assert_close(
        noising("epsilon").add_noise(LATENTS, NOISE, TIMESTEPS).flatten(), torch.tensor([7.6, 9.2])
    )
    assert torch.equal(noising("epsilon").target(LATENTS, NOISE, TIMESTEPS), NOISE)
    assert torch.equal(noising("sample").target(LATENTS, NOISE, TIMESTEPS), LATENTS)
    # v = 0.8 * 10 - 0.6 * 2 and 0.6 * 10 - 0.8 * 2
    velocity = noising("v_prediction").target(LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(velocity.flatten(), torch.tensor([6.8, 4.4]))
    torch.testing.assert_close(noising("epsilon").snr(TIMESTEPS), torch.tensor([0.64 / 0.36, 0.36 / 0.64]))


def test_equals_diffusers():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = Noising(scheduler.alphas_cumprod, "v_prediction")
    latents, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    timesteps = torch.tensor([3, 999])
    torch.testing.assert_close(
        ours.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps)
    )
    torch.testing.assert_close(
        ours.target(latents, noise, timesteps), scheduler.get_velocity(latents, noise, timesteps)
    )


def test_unknown_prediction_type_is_refused():
    with pytest.raises(InputError, match="flow_prediction"):
        noising("flow_prediction")
