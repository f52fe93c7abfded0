import pytest
import torch

from dpt_t2i.backbones.types import TextStates
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.correct import correct
from tests.sampling.stubs import states

TEXT = TextStates(torch.zeros(2, 1, 1), torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool))
TIMESTEPS = torch.tensor([500, 500])
LATENTS = torch.tensor([3.0, 4.0, 6.0, 8.0]).reshape(2, 1, 1, 2)  # |z| = 5 and 10


def linear(slope: torch.Tensor):
    """A score whose gradient in z is `slope`, whatever z is."""
    return lambda z, t, text: (z * slope).flatten(1).sum(1)


def test_fixed_rule_steps_by_the_gradient_itself():
    slope = torch.tensor([1.0, -2.0, 0.0, 0.5]).reshape(2, 1, 1, 2)
    moved, scores = correct(LATENTS, TIMESTEPS, TEXT, score=linear(slope), strength=0.5)
    torch.testing.assert_close(moved.flatten(), torch.tensor([3.5, 3.0, 6.0, 8.25]))
    torch.testing.assert_close(scores, torch.tensor([3.0 - 8.0, 4.0]))
    assert not moved.requires_grad and not scores.requires_grad


def test_relative_rule_steps_by_a_share_of_the_latents_norm_each():
    slope = torch.tensor([300.0, 400.0, 0.0, 0.001]).reshape(2, 1, 1, 2)
    moved, _ = correct(LATENTS, TIMESTEPS, TEXT, score=linear(slope), strength=0.1, rule="relative")
    # 0.1 * 5 along (0.6, 0.8); 0.1 * 10 along (0, 1)
    torch.testing.assert_close(moved.flatten(), torch.tensor([3.3, 4.4, 6.0, 9.0]))


def test_a_zero_gradient_leaves_the_sample_alone():
    slope = torch.tensor([0.0, 0.0, 0.0, 1.0]).reshape(2, 1, 1, 2)
    moved, _ = correct(LATENTS, TIMESTEPS, TEXT, score=linear(slope), strength=0.1, rule="relative")
    assert torch.equal(moved[0], LATENTS[0])
    assert torch.isfinite(moved).all()


def test_gradient_is_that_of_a_hand_derived_score():
    def cosine(z, t, text):
        return torch.nn.functional.cosine_similarity(z.flatten(1), torch.tensor([[1.0, 0.0]]))

    moved, scores = correct(LATENTS, TIMESTEPS, TEXT, score=cosine, strength=1.0)
    # d/dz (x / |z|) = (1/|z| - x^2/|z|^3, -xy/|z|^3)
    torch.testing.assert_close(moved[0].flatten(), torch.tensor([3 + 1 / 5 - 9 / 125, 4 - 12 / 125]))
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.6]))


def test_gradient_mode_outside_does_not_matter_and_is_left_as_it_was():
    slope = torch.ones(2, 1, 1, 2)
    latents = LATENTS.clone().requires_grad_(True)
    with torch.no_grad():
        moved, _ = correct(latents, TIMESTEPS, TEXT, score=linear(slope), strength=1.0)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(moved, LATENTS + 1)
    assert latents.grad is None
    assert torch.equal(latents.detach(), LATENTS)


def test_half_precision_latents_are_corrected_in_float32():
    seen = []

    def score(z, t, text):
        seen.append(z.dtype)
        return z.flatten(1).sum(1)

    moved, _ = correct(LATENTS.bfloat16(), TIMESTEPS, TEXT, score=score, strength=2**-12)
    assert seen == [torch.float32]
    torch.testing.assert_close(moved, LATENTS + 2**-12, rtol=0, atol=1e-7)


def test_inference_mode_and_nan_are_refused():
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        correct(LATENTS, TIMESTEPS, TEXT, score=linear(torch.ones(2, 1, 1, 2)), strength=1.0)
    with pytest.raises(InputError, match="timestep 500 is NaN"):
        correct(LATENTS, TIMESTEPS, TEXT, score=lambda z, t, text: (z * float("nan")).sum((1, 2, 3)), strength=1.0)


def test_small_gradients_live_in_half_precision_and_large_ones_too():
    """A score whose gradient passes through float16, as a denoiser's does; 1e-5 has four bits left there."""
    point = torch.linspace(1, 2, 16).reshape(1, 1, 4, 4)

    def through_half(scale):
        def score(z, timesteps, text):
            half = (z * 1.0).half().float()  # its gradient is rounded to float16 on the way back
            return (scale * half**2).flatten(1).sum(1)

        return score

    for scale in (2.0**-18, 2.0**-3, 2.0**12):
        moved, _ = correct(point, torch.tensor([5]), states(1), score=through_half(scale), strength=1 / scale)
        torch.testing.assert_close(moved - point, 2 * point, rtol=2e-3, atol=0)
