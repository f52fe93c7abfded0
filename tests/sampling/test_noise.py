import torch

from dpt_t2i.sampling.noise import initial_noise, shared_noise


def test_initial_noise_is_what_diffusers_draws_from_the_same_seed():
    expected = torch.randn((4, 8, 8), generator=torch.Generator("cpu").manual_seed(12))
    assert torch.equal(initial_noise(12, (4, 8, 8)), expected)


def test_shared_noise_depends_on_seed_and_draw_and_on_nothing_else():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = shared_noise(1, 2, (4, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(shared_noise(1, 2, (4, 8, 8)), first)
    others = [shared_noise(*key, (4, 8, 8)) for key in ((2, 1), (1, 3), (0, 2), (12, 0))]
    assert all(not torch.equal(first, other) for other in others)
    assert abs(first.mean()) < 0.2 and abs(first.std() - 1) < 0.2
