import pytest
import torch

from dpt_t2i.backbones.latents import decode_image, encode_image
from dpt_t2i.errors import InputError
from tests.tiny import tiny_pipeline

PIXELS = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_mean_without_and_sample_with_a_generator():
    vae = tiny_pipeline().vae
    posterior = vae.encode(PIXELS).latent_dist
    mean = encode_image(vae, PIXELS, 4)
    assert mean.shape == (2, 4, 8, 6)
    torch.testing.assert_close(mean, posterior.mean * vae.config.scaling_factor)
    drawn = encode_image(vae, PIXELS, 4, torch.Generator().manual_seed(7))
    noise = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise) * vae.config.scaling_factor)
    assert torch.equal(drawn, encode_image(vae, PIXELS, 4, torch.Generator().manual_seed(7)))


@torch.no_grad()
def test_shift_and_scale_go_in_and_come_out_again():
    vae = tiny_pipeline().vae
    plain = encode_image(vae, PIXELS, 4) / vae.config.scaling_factor
    vae.register_to_config(shift_factor=0.25, scaling_factor=2.0)
    shifted = encode_image(vae, PIXELS, 4)
    torch.testing.assert_close(shifted, (plain - 0.25) * 2.0)
    torch.testing.assert_close(decode_image(vae, shifted), vae.decode(plain).sample, rtol=1e-4, atol=1e-5)


def test_a_side_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="30 x 32.*multiples of 4"):
        encode_image(tiny_pipeline().vae, torch.zeros(1, 3, 32, 30), 4)
