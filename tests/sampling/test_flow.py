"""Flow matching: the loop against the stock SD 3 and FLUX pipelines, and the correction by hand."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, UniPCMultistepScheduler
from torch import Tensor

from dpt_t2i.backbones.flow_noising import FLOW
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.types import Features, TextStates
from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.generate import generate, jobs_of
from dpt_t2i.sampling.loop import sample
from dpt_t2i.sampling.noise import initial_noise
from dpt_t2i.sampling.schedulers import make_scheduler
from dpt_t2i.sampling.scoring import MatchScorer
from tests.families import save_flux, save_sd3
from tests.sampling.stubs import states
from tests.tiny import tiny_adapter

PROMPTS = ["a red circle", "two blue stars"]
NOISE = torch.stack([initial_noise(seed, (16, 8, 8)) for seed in (0, 1)])
OFF = CorrectionConfig()
SCALE = {"guidance_scale": 7.0}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return load_backbone(save_sd3(tmp_path_factory.mktemp("sd3") / "sd3"), device="cpu")


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return load_backbone(save_flux(tmp_path_factory.mktemp("flux") / "dev"), device="cpu")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    return load_backbone(save_flux(tmp_path_factory.mktemp("flux") / "schnell", guidance=False), device="cpu")


@pytest.mark.parametrize("shift", [{"shift": 3.0}, {"use_dynamic_shifting": True, "base_image_seq_len": 4}])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sd3_images_are_those_of_the_stock_pipeline(sd3, guidance, shift):
    sd3.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**shift)
    settings = SampleConfig(steps=4, guidance_scale=guidance, scheduler="euler", negative_prompt="left")
    text, null = sd3.encode_text(PROMPTS), sd3.encode_text(["left"] * 2)
    ours = sample(sd3, text, null, NOISE, settings, OFF)
    theirs = sd3.pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=guidance, negative_prompt=["left"] * 2, latents=NOISE,
        output_type="latent", height=32, width=32,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 3.5, 7.0])
@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_flux_images_are_those_of_the_stock_pipeline(variant, guidance, request):
    backbone = request.getfixturevalue(variant)
    settings = SampleConfig(steps=4, guidance_scale=guidance, scheduler="euler")
    text = backbone.encode_text(PROMPTS)
    ours = sample(backbone, text, text, NOISE, settings, OFF)
    theirs = backbone.pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=guidance, output_type="latent", height=32, width=32,
        latents=FluxPipeline._pack_latents(NOISE, 2, 16, 8, 8),
    ).images  # fmt: skip
    torch.testing.assert_close(
        ours, FluxPipeline._unpack_latents(theirs, 32, 32, backbone.vae_scale), rtol=1e-4, atol=1e-4
    )


def test_flux_has_one_branch_told_3_5_where_nobody_says(dev):
    """No classifier-free guidance: as many rows as images reach the denoiser, whatever the scale."""
    told = []
    handle = dev.denoiser.register_forward_pre_hook(
        lambda _module, _args, given: told.append(given["guidance"].tolist()), with_kwargs=True
    )
    text = dev.encode_text(PROMPTS)
    try:
        unsaid, said = (sample(dev, text, text, NOISE, SampleConfig(steps=1, **own), OFF) for own in ({}, SCALE))
    finally:
        handle.remove()
    assert told == [[3.5, 3.5], [7.0, 7.0]]
    assert not torch.allclose(unsaid, said, atol=1e-4)


def test_guidance_that_is_an_input_has_no_interval(dev):
    with pytest.raises(InputError, match="input of this denoiser at every step; leave guidance_start and guidance_end"):
        list(generate(dev, jobs_of(PROMPTS[:1], [7]), SampleConfig(steps=2, guidance_start=0.1)))


def test_seeded_images_are_the_stock_pipelines_and_no_batch_matters(dev):
    adapter = tiny_adapter(dev, "double1")
    scorer = MatchScorer(dev, adapter, dev.parse_taps("double1"))
    settings = {"steps": 2, "guidance_scale": 3.5, "scheduler": "euler"}
    (plain,) = generate(dev, jobs_of(PROMPTS[:1], [7]), SampleConfig(**settings))
    stock = dev.pipeline(
        PROMPTS[0], num_inference_steps=2, guidance_scale=3.5, generator=torch.Generator().manual_seed(7), height=32,
        width=32, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(
        plain.latents[None], FluxPipeline._unpack_latents(stock, 32, 32, 4), rtol=1e-4, atol=1e-4
    )
    correction = CorrectionConfig(correct=0.05, correction_rule="relative")
    jobs = jobs_of(PROMPTS, [7, 8])
    together, alone = (
        list(generate(dev, jobs, SampleConfig(batch_size=size, **settings), correction, scorer)) for size in (4, 1)
    )
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.latents, other.latents, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0].latents, plain.latents, atol=1e-3)


@pytest.mark.parametrize("mode", ["state", "noise"])
@pytest.mark.parametrize("family", ["sd3", "dev"])
def test_a_correction_moves_the_image_in_both_modes(family, mode, request):
    backbone = request.getfixturevalue(family)
    tap = next(reversed(backbone.taps))
    scorer = MatchScorer(backbone, tiny_adapter(backbone, tap), backbone.parse_taps(tap))
    text, null = backbone.encode_text(PROMPTS), backbone.null_text(2)
    settings = SampleConfig(steps=2, guidance_scale=3.0)
    correction = CorrectionConfig(correct=0.05, correction_rule="relative", correction_mode=mode)
    scores: list[Tensor] = []
    made = sample(backbone, text, null, NOISE, settings, correction, scorer, lambda step: scores.append(step.scores))
    plain = sample(backbone, text, null, NOISE, settings, OFF)
    assert bool(torch.isfinite(made).all())
    assert float((made - plain).norm() / plain.norm()) > 1e-4
    # What was climbed is the score of the uncorrected first state, at full noise and by the adapter's own judgement.
    with torch.no_grad():
        first = scorer(NOISE, torch.full((2,), 1000.0), text)
    torch.testing.assert_close(scores[0], first, rtol=1e-4, atol=1e-5)


class ConstantVelocity:
    """A flow whose velocity is `V` everywhere: a step is exact, and a shift of z stays as it is to the end."""

    V = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prediction_type = FLOW
    name = "constant"
    guidance_interval = (0.0, 1.0)
    eta = 0.0
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.pipeline = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True))
        self.vae_scale, self.image_size = 4, (32, 32)
        self.seen: list[Tensor] = []

    def schedule(self, steps: int, height: int, width: int) -> dict[str, int]:
        return {"num_inference_steps": steps}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> tuple[Tensor, Features]:
        self.seen.append(noisy)
        return self.V.expand_as(noisy), Features({}, timesteps)


def total(z: Tensor, t: Tensor, text: TextStates) -> Tensor:
    return z.flatten(1).sum(1)


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_shift_at_one_step_arrives_whole(name, step):
    settings = SampleConfig(steps=5, guidance_scale=1.0, scheduler=name)
    noise = initial_noise(0, (1, 4, 8, 8))
    at_one = {"correct": 0.25, "correction_start": step / 5, "correction_end": (step + 0.5) / 5}
    backbone = ConstantVelocity()
    moved = sample(backbone, states(1), states(1), noise, settings, CorrectionConfig(**at_one), total)
    # The gradient of a sum is one everywhere; the flow from sigma 1 to 0 takes the velocity away once.
    torch.testing.assert_close(moved, noise - ConstantVelocity.V + 0.25)
    in_noise = CorrectionConfig(**at_one, correction_mode="noise")
    backbone = ConstantVelocity()
    kept = sample(backbone, states(1), states(1), noise, settings, in_noise, total)
    plain = sample(ConstantVelocity(), states(1), states(1), noise, settings, OFF)
    assert torch.equal(kept, plain)  # the velocity does not depend on z here: only the denoiser's input moved
    start = noise - (1 - sigmas(settings)[step]) * ConstantVelocity.V
    torch.testing.assert_close(backbone.seen[step], start + 0.25)


def sigmas(settings: SampleConfig) -> Tensor:
    return make_scheduler(ConstantVelocity(), settings.scheduler, settings.steps).sigmas


def test_the_shift_of_the_scheduler_is_in_the_schedule():
    # sigma' = 3 sigma / (1 + 2 sigma), from noise to (shifted) 1 / 1000
    found = sigmas(SampleConfig(steps=3))
    lowest = 3 / 1000 / (1 + 2 / 1000)
    even = torch.tensor([1.0, (1 + lowest) / 2, lowest])
    torch.testing.assert_close(found, torch.cat([3 * even / (1 + 2 * even), torch.zeros(1)]))


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_samplers_of_other_noise_are_refused(name):
    with pytest.raises(
        InputError, match="is not for flow matching, which base `constant` uses; give `ddim` or `euler`"
    ):
        make_scheduler(ConstantVelocity(), name, 5)


def test_sizes_and_settings_that_do_not_fit_are_named(dev):
    settings = SampleConfig(steps=1, guidance_scale=3.5)
    with pytest.raises(InputError, match="image of 32 x 20 pixels: both sides must be multiples of 8"):
        list(generate(dev, jobs_of(PROMPTS, [0]), settings, height=20, width=32))
    negative = SampleConfig(steps=1, negative_prompt="left")
    with pytest.raises(InputError, match="no unconditional branch; leave negative_prompt out"):
        list(generate(dev, jobs_of(PROMPTS, [0]), negative))


def test_a_flow_base_that_samples_by_unipc_keeps_its_shift():
    """UniPC and DPM++ call `flow_shift` what flow matching's own scheduler calls `shift`."""
    backbone = ConstantVelocity()
    own = make_scheduler(backbone, "euler", 5)
    backbone.pipeline.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    made = make_scheduler(backbone, "euler", 5)
    assert made.config.shift == 3.0 and torch.equal(made.sigmas, own.sigmas)
