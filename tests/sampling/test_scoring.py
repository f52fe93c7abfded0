import pytest
import torch

from dpt_t2i.adapter.score import match_score
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.noise import shared_noise
from dpt_t2i.sampling.scoring import Judge, MatchScorer
from tests.tiny import tiny_adapter, tiny_backbone

PROMPTS = ["a red circle", "two blue stars", "the square"]
LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def scorer(taps: str = "up1") -> MatchScorer:
    backbone = tiny_backbone()
    return MatchScorer(backbone, tiny_adapter(backbone, taps), backbone.parse_taps(taps))


@pytest.mark.parametrize("taps", ["up1", "bottom0_up1"])
def test_a_score_is_match_score_of_the_features(taps):
    judge = scorer(taps)
    text = judge.backbone.encode_text(PROMPTS)
    timesteps = torch.tensor([1, 500, 999])
    with torch.no_grad():
        features = judge.backbone.features(LATENTS, timesteps, text, judge.taps)
        expected = match_score(judge.adapter(features), text.pooled)
        torch.testing.assert_close(judge(LATENTS, timesteps, text), expected)


def test_the_score_has_a_gradient_in_the_latents_sample_by_sample():
    judge = scorer()
    text = judge.backbone.encode_text(PROMPTS)
    point = LATENTS.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(judge(point, torch.tensor([500] * 3), text)[1], point)
    assert gradient[1].abs().max() > 0
    assert gradient[0].abs().max() == 0 == gradient[2].abs().max()


def test_dropout_is_no_judge():
    backbone = tiny_backbone()
    adapter = tiny_adapter(backbone).train()
    MatchScorer(backbone, adapter, backbone.parse_taps("up1"))
    assert not any(module.training for module in adapter.modules())


def test_images_are_scored_over_noises_that_they_share():
    judge = scorer()
    text = judge.backbone.encode_text(PROMPTS)
    got = judge.score_images(LATENTS, text, timestep=250, draws=2, seed=9)
    expected = torch.zeros(3)
    for draw in (0, 1):
        for row in range(3):
            index = torch.tensor([row])
            noise = shared_noise(9, draw, (4, 8, 8))[None]
            noisy = judge.backbone.add_noise(LATENTS[row : row + 1], noise, torch.tensor([250]))
            with torch.no_grad():
                expected[row] += judge(noisy, torch.tensor([250]), text.select(index))[0] / 2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not got.requires_grad


def test_batches_and_order_change_nothing():
    judge = scorer()
    text = judge.backbone.encode_text(PROMPTS)
    whole = judge.score_images(LATENTS, text, 250, 2, 0)
    torch.testing.assert_close(judge.score_images(LATENTS, text, 250, 2, 0, batch_size=2), whole)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(judge.score_images(LATENTS[order], text.select(order), 250, 2, 0), whole[order])
    same = LATENTS[:1].expand(2, -1, -1, -1)
    twins = judge.score_images(same, text.select(torch.tensor([0, 0])), 250, 2, 0)
    torch.testing.assert_close(twins[0], twins[1])
    assert not torch.allclose(judge.score_images(LATENTS, text, 250, 2, 1), whole)
    torch.testing.assert_close(Judge(judge, 250, 2, 0)(LATENTS, text), whole)
    assert judge.score_images(LATENTS[:0], text.select(order[:0]), 250, 2, 0).shape == (0,)


def test_nan_and_impossible_timesteps_are_refused():
    judge = scorer()
    text = judge.backbone.encode_text(PROMPTS)
    with pytest.raises(InputError, match="score_timestep 1000 is not in 0..999"):
        judge.score_images(LATENTS, text, 1000, 1, 0)
    broken = LATENTS.clone()
    broken[1] = float("nan")
    with pytest.raises(InputError, match="image 1 is NaN"):
        judge.score_images(broken, text, 250, 1, 0)
