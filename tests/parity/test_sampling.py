"""Self-correction and matching scores of images, against the release; and where we decided otherwise, both numbers."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from PIL import Image
from torch import Tensor

from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.data.transforms import to_pixels
from dpt_t2i.evaluation import examples as evaluation_examples
from dpt_t2i.evaluation.examples import EvalExample
from dpt_t2i.evaluation.itm import ItmScores, itm_scores
from dpt_t2i.sampling.loop import Step, sample
from dpt_t2i.sampling.scoring import MatchScorer
from tests.parity.golden import SHARED, adapter, backbone, close, model, needs_shared, numbers, tensors

pytestmark = needs_shared


def scorer() -> MatchScorer:
    return MatchScorer(backbone(lora=True), adapter(), model().parse_taps("up1"))


@dataclass(frozen=True)
class Run:
    latents: list[Tensor]  # after each of the 10 steps, [2, 4, 24, 24]
    scores: list[Tensor | None]


@cache
@torch.no_grad()
def trajectory(eta: float, mode: str) -> Run:
    golden, settings = tensors("self_correction"), numbers("self_correction")
    judge, told = scorer(), list[Step]()
    text, null = model().encode_text(settings["prompts"]), model().null_text(2)
    sample(
        model(), text, null, golden["init_latents"],
        SampleConfig(steps=settings["steps"], guidance_scale=settings["guidance_scale"]),
        CorrectionConfig.model_validate({"correct": eta, "correction_mode": mode}),
        judge, told.append,
    )  # fmt: skip
    return Run([step.latents for step in told], [step.scores for step in told])


def as_uint8(latents: Tensor) -> Tensor:
    """The decoded image's every eighth pixel, `[2, 24, 24, 3]`, as in the goldens."""
    pixels = model().decode_image(latents)
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)[:, ::8, ::8]


def test_texts_of_both_branches() -> None:
    golden = tensors("self_correction")
    text = model().encode_text(["", "", *numbers("self_correction")["prompts"]])
    close(text.tokens, golden["context"])
    close(text.pooled, golden["context_pooled"])


@pytest.mark.parametrize("eta", [0, 0.5, 200])
def test_the_trajectory_in_noise_mode(eta: float) -> None:
    """Every step but the last; what the release decodes is then the latent of the one before."""
    golden, ours = tensors("self_correction"), trajectory(eta, "noise")
    for step in range(9):
        close(ours.latents[step], golden[f"eta{eta}.latents"][step + 1])
    if eta:
        scores = [step for step in ours.scores if step is not None]
        torch.testing.assert_close(torch.stack(scores), golden[f"eta{eta}.score"], rtol=1e-3, atol=2e-5)
    with torch.no_grad():
        off = as_uint8(ours.latents[8]).int() - golden[f"eta{eta}.image_uint8_every8"].int()
    assert int(off.abs().max()) <= 1


def test_the_gradient_and_the_predictions_of_the_first_step() -> None:
    golden, judge = tensors("self_correction"), scorer()
    text = model().encode_text(numbers("self_correction")["prompts"])
    timesteps = torch.full((2,), 901)
    point = golden["init_latents"].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(judge(point, timesteps, text).sum(), point)
    close(gradient, golden["eta0.5.grad_cond"][0], relative=5e-4)
    with torch.no_grad():
        conditional = model().predict(point.detach() + 0.5 * gradient, timesteps, text)[0]
        unconditional = model().predict(golden["init_latents"], timesteps, model().null_text(2))[0]
    close(conditional, golden["eta0.5.noise_cond.step0"])
    close(unconditional, golden["eta0.5.noise_uncond.step0"])
    close(unconditional + 7.5 * (conditional - unconditional), golden["eta0.5.noise_pred_cfg.step0"])


@pytest.mark.parametrize("eta", [0, 0.5, 200])
def test_differs_the_last_step_is_run(eta: float) -> None:
    """The release re-noises to level 901 (std about 1) and throws that away; DDIM's own last step barely moves."""
    golden, ours = tensors("self_correction"), trajectory(eta, "noise")
    close(ours.latents[9], golden[f"eta{eta}.ddim_true_final"])
    theirs = golden[f"eta{eta}.latents"][10]
    assert float(theirs.std()) == pytest.approx(
        numbers("self_correction")[f"eta{eta}.checks"]["std_latents"][10], rel=1e-3
    )
    assert float(ours.latents[9].std()) > 8 * float(theirs.std())
    decoded_by_release = golden[f"eta{eta}.latents"][9]
    assert 1e-4 < float((ours.latents[9] - decoded_by_release).abs().max()) < 1.0


def test_differs_the_state_is_corrected() -> None:
    """`mode="state"`, the paper's: the sampler steps from the corrected latent, so the first step already parts."""
    golden, ours = tensors("self_correction"), trajectory(200, "state")
    theirs = golden["eta200.latents"]
    close(trajectory(200, "noise").latents[0], theirs[1])
    assert float((ours.latents[0] - theirs[1]).abs().max()) > 0.1
    assert ours.scores[0] is not None
    torch.testing.assert_close(ours.scores[0], golden["eta200.score"][0], rtol=1e-3, atol=2e-5)


def test_differs_dropout_is_off_while_sampling() -> None:
    """The release never calls `.eval()`: with its dropout of 0.1 the first step's score changes from draw to draw, and
    the correction climbs another function each time. Ours judges in eval mode, whatever the adapter was left in."""
    golden = tensors("self_correction")
    text, timesteps = model().encode_text(numbers("self_correction")["prompts"]), torch.full((2,), 901)
    left_training = adapter().train()
    assert left_training.config.dropout == 0.1
    judge = MatchScorer(backbone(lora=True), left_training, model().parse_taps("up1"))

    def judged() -> tuple[Tensor, Tensor]:
        point = golden["init_latents"].clone().requires_grad_(True)
        scores = judge(point, timesteps, text)
        return scores.detach(), torch.autograd.grad(scores.sum(), point)[0]

    scores, gradient = judged()
    torch.testing.assert_close(scores, golden["eta0.5.score"][0], rtol=1e-3, atol=2e-5)
    close(gradient, golden["eta0.5.grad_cond"][0], relative=5e-4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left_training.train()
        (one, _), (other, their_gradient) = judged(), judged()
    assert float((one - other).abs().max()) > 1e-3
    assert float((their_gradient - gradient).norm() / gradient.norm()) > 0.1


def pixels(number: int) -> Tensor:
    return to_pixels(Image.open(SHARED / "itm_scores" / f"img{number}.png").convert("RGB"))


def latents_of(numbers_: list[int], draw: Tensor) -> Tensor:
    """The release's: a sample of the VAE's posterior, from the stored epsilon."""
    golden = tensors("itm_scores")
    return (golden["vae_mean"][numbers_] + golden["vae_std"][numbers_] * draw) * 0.18215


@torch.no_grad()
def score(judge: MatchScorer, latents: Tensor, noise: Tensor, texts: list[str]) -> Tensor:
    steps = torch.full((len(latents),), 500)
    return judge(model().add_noise(latents, noise.expand_as(latents), steps), steps, model().encode_text(texts))


def test_images_are_encoded_to_the_posteriors_mean() -> None:
    golden = tensors("itm_scores")
    with torch.no_grad():
        ours = model().encode_image(torch.stack([pixels(i) for i in range(6)]))
    close(ours, golden["vae_mean"] * numbers("itm_scores")["vae_scaling_factor"])


def test_matching_scores_with_the_releases_draws() -> None:
    golden, told, judge = tensors("itm_scores"), numbers("itm_scores"), scorer()
    columns = []
    for column, texts in enumerate(told["txt.texts"]):
        latents = latents_of(told["txt.image_ids"][0], golden[f"txt.draw{2 * column + 1}.vae_eps"])
        columns.append(score(judge, latents, golden[f"txt.draw{2 * column}.noise"], texts))
    torch.testing.assert_close(torch.stack(columns, dim=1), golden["txt.scores"], rtol=1e-4, atol=1e-5)


def test_differs_a_batch_of_one_keeps_its_shape() -> None:
    """The release's scores of one example are (1, 2, 1), ours one number an image."""
    golden, told, judge = tensors("itm_scores"), numbers("itm_scores"), scorer()
    found = []
    for row, ids in enumerate(told["single.image_ids"]):
        latents = latents_of(ids, golden[f"single.draw{row + 1}.vae_eps"])
        found.append(score(judge, latents, golden["single.draw0.noise"], told["single.texts"][0]))
    assert [tuple(one.shape) for one in found] == [(1,), (1,)] and golden["single.scores"].shape == (1, 2, 1)
    torch.testing.assert_close(torch.cat(found), golden["single.scores"].flatten(), rtol=1e-4, atol=1e-5)


def test_differs_one_noise_for_the_texts_that_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The release judges the positive under one noise and a sampled latent, the negative under others."""
    golden, told, judge = tensors("itm_scores"), numbers("itm_scores"), scorer()
    noise = golden["txt.draw0.noise"]
    monkeypatch.setattr(evaluation_examples, "shared_noise", lambda seed, index, shape: noise[index])
    texts = told["txt.texts"]
    examples = [EvalExample(str(i), pixels(i), texts[0][i], hard_caption=texts[1][i]) for i in range(3)]
    rows = itm_scores(judge, examples, (500,))
    mean = golden["vae_mean"][:3] * 0.18215
    for column, name in enumerate(("positive", "wrong_text")):
        by_hand = score(judge, mean, noise, texts[column])
        ours = torch.tensor([getattr(row, name) for row in rows])
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
    margins = torch.tensor([row.positive - (row.wrong_text or 0.0) for row in rows])
    theirs = golden["txt.scores"][:, 0] - golden["txt.scores"][:, 1]
    assert float((margins - theirs).abs().max()) > 0.01


def test_differs_a_tie_is_never_right() -> None:
    """The release takes the first of equal scores, and the positive is always first; NaN is an error (test_itm)."""
    tied = torch.tensor([0.3, 0.3])
    theirs = int(tied.numpy().argmax()) == 0
    assert theirs is True and ItmScores("x", "rule", 500, 0.3, 0.3, 0.3).text_right is False
