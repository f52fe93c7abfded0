import pytest
import torch
from PIL import ImageChops

from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.generate import Job, generate, jobs_of, latent_shape
from dpt_t2i.sampling.scoring import Judge, MatchScorer
from tests.tiny import tiny_adapter, tiny_backbone

PROMPTS = ["a red circle", "two blue stars"]


def settings(**changes) -> SampleConfig:
    return SampleConfig(steps=3, guidance_scale=3.0, **changes)


def assert_same(one, other) -> None:
    """Equal up to the rounding of kernels, which differs between batch sizes: a grey level at most."""
    extremes = ImageChops.difference(one.image, other.image).getextrema()
    assert max(high for _, high in extremes) <= 1
    torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-4)


def test_jobs_are_every_prompt_with_every_seed():
    assert jobs_of(["p", "q"], [3, 1]) == [Job(0, "p", 3, 3), Job(0, "p", 1, 1), Job(1, "q", 3, 3), Job(1, "q", 1, 1)]
    for prompts, seeds, said in (
        ([], [0], "nothing to generate"),
        (["p"], [], "nothing to generate"),
        (["p"], [-1], "seed -1 is negative"),
        (["p"], [2**32], "seed 4294967296 is too large"),
        (["a \ud83d circle"], [0], "is no text"),
    ):
        with pytest.raises(InputError, match=said):
            jobs_of(prompts, seeds)


def test_the_image_is_the_stock_pipelines_for_the_same_seed():
    backbone = tiny_backbone()
    (made,) = generate(backbone, jobs_of(["a red circle"], [7]), settings())
    stock = backbone.pipeline(
        "a red circle", num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(7)
    ).images[0]  # fmt: skip
    assert made.image.size == stock.size == (32, 32)
    assert max(high for _, high in ImageChops.difference(made.image, stock).getextrema()) <= 1
    assert made.score is None


def test_fresh_noise_in_each_step_is_the_stock_pipelines_too():
    backbone = tiny_backbone()
    made = list(generate(backbone, jobs_of(["a red circle"], [7, 8]), settings(eta=0.7)))
    for image, seed in zip(made, (7, 8), strict=True):
        stock = backbone.pipeline(
            "a red circle", num_inference_steps=3, guidance_scale=3.0, eta=0.7, output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip
        torch.testing.assert_close(image.latents, stock, rtol=1e-4, atol=1e-4)
    (plain,) = generate(backbone, jobs_of(["a red circle"], [7]), settings())
    assert (plain.latents - made[0].latents).abs().max() > 0.1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_batch_size_order_and_neighbours_change_nothing(eta):
    backbone = tiny_backbone()
    jobs = jobs_of(PROMPTS, [0, 1, 2])
    reference = {made.job: made for made in generate(backbone, jobs, settings(batch_size=8, eta=eta))}
    assert list(reference) == jobs
    for made in generate(backbone, jobs, settings(batch_size=4, eta=eta)):
        assert_same(made, reference[made.job])
    for made in generate(backbone, jobs[::-2], settings(batch_size=1, eta=eta)):
        assert_same(made, reference[made.job])
    images = [made.image.tobytes() for made in reference.values()]
    assert len(set(images)) == len(images)


def test_corrected_images_are_drawn_alone():
    """Rounding differs between batch sizes, and the score's gradient enlarges it: to other images, on a real model."""
    backbone = tiny_backbone()
    scorer = MatchScorer(backbone, tiny_adapter(backbone), backbone.parse_taps("up1"))
    seen = []
    backbone.denoiser.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    correction = CorrectionConfig(correct=0.3, correction_rule="relative")
    jobs = jobs_of(PROMPTS, [0, 1])

    def latents(jobs, batch_size):
        made = generate(backbone, jobs, settings(batch_size=batch_size), correction, scorer)
        return {one.job: one.latents for one in made}

    reference = latents(jobs, 8)
    assert set(seen) == {1, 2}  # the pass of the score, and both branches of the guided one
    for other in (latents(jobs[::-1], 3), latents(jobs[1:2], 1)):
        assert all(torch.equal(value, reference[job]) for job, value in other.items())


def test_the_global_random_state_neither_matters_nor_changes():
    backbone = tiny_backbone()
    jobs = jobs_of(["a red circle"], [0])
    torch.manual_seed(1)
    (one,) = generate(backbone, jobs, settings())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    (two,) = generate(backbone, jobs, settings())
    assert torch.equal(one.latents, two.latents)
    assert torch.equal(torch.get_rng_state(), state)


def test_correction_and_judge():
    backbone = tiny_backbone()
    scorer = MatchScorer(backbone, tiny_adapter(backbone), backbone.parse_taps("up1"))
    judge = Judge(scorer, 250, 2, 0)
    jobs = jobs_of(["a red circle"], [0, 1])
    plain = list(generate(backbone, jobs, settings(), judge=judge))
    correction = CorrectionConfig(correct=0.05, correction_rule="relative")
    corrected = list(generate(backbone, jobs, settings(), correction, scorer, judge))
    text = backbone.encode_text(["a red circle"] * 2)
    expected = scorer.score_images(torch.stack([made.latents for made in plain]), text, 250, 2, 0)
    torch.testing.assert_close(torch.tensor([made.score for made in plain]), expected)
    assert not torch.allclose(plain[0].latents, corrected[0].latents)


def test_sizes():
    backbone = tiny_backbone()
    assert latent_shape(backbone, None, None) == (4, 8, 8)
    (made,) = generate(backbone, jobs_of(["a star"], [0]), settings(), height=40, width=24)
    assert made.image.size == (24, 40)
    with pytest.raises(InputError, match="width 30 must be a positive multiple of 4"):
        latent_shape(backbone, 32, 30)


def test_nan_images_name_prompt_and_seed():
    backbone = tiny_backbone()
    with torch.no_grad():
        backbone.pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="prompt `a star` with seed 4 is NaN"):
        list(generate(backbone, jobs_of(["a star"], [4]), settings()))
