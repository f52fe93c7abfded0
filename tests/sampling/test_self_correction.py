"""Self-correction inside stock diffusers pipelines, against our own loop, which is tested by hand elsewhere."""

from contextlib import contextmanager

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading

import dpt_t2i
from dpt_t2i.adapter.io import save_adapter
from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.types import AdapterOrigin
from dpt_t2i.backbones.fingerprint import lora_hash
from dpt_t2i.backbones.loading import backbone_of, load_backbone
from dpt_t2i.backbones.lora import add_lora, lora_parameters, save_lora
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.loop import sample
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.sampling.noise import initial_noise
from dpt_t2i.sampling.schedulers import make_scheduler
from dpt_t2i.sampling.self_correction import SelfCorrection
from tests.families import save_flux, save_pixart_sigma, save_sd3
from tests.sampling.stubs import NOISE
from tests.tiny import tiny_adapter, tiny_backbone, tiny_pipeline

SAMPLERS = ("ddim", "euler", "dpm++", "unipc")
PROMPTS = ["a red circle", "two blue stars"]
STEPS = 4
RELATIVE = {"correct": 0.1, "correction_rule": "relative"}


def corrected_pipeline(sampler="ddim", **settings):
    """A stock pipeline with that sampler, and a correction strong enough to be seen."""
    backbone = tiny_backbone()
    pipeline = backbone.pipeline
    pipeline.scheduler = make_scheduler(backbone, sampler, STEPS)
    return pipeline, SelfCorrection(pipeline, tiny_adapter(backbone), **(RELATIVE | settings))


def noise_of(images=2):
    return torch.stack([initial_noise(seed, (4, 8, 8)) for seed in range(images)])


def run(pipeline, prompts=PROMPTS, guidance=4.0, latents=None, **arguments):
    latents = noise_of(len(prompts)) if latents is None else latents
    return pipeline(
        prompts, latents=latents, num_inference_steps=STEPS, guidance_scale=guidance, output_type="latent", **arguments
    ).images  # fmt: skip


def by_our_loop(correction, sampler, guidance=4.0, prompts=PROMPTS, latents=None, **changes):
    backbone = tiny_backbone()
    settings = SampleConfig(steps=STEPS, guidance_scale=guidance, scheduler=sampler)
    config = correction.config.model_copy(update=changes)
    text, null = backbone.encode_text(prompts), backbone.null_text(len(prompts))
    latents = noise_of(len(prompts)) if latents is None else latents
    return sample(backbone, text, null, latents, settings, config, correction.scorer)


def of_family(folder, tap):
    """The stock pipeline of a saved base, and an adapter that reads its `tap`."""
    pipeline = load_backbone(folder, device="cpu").pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, tiny_adapter(load_backbone(folder, device="cpu"), tap)


def inputs_of(denoiser):
    """What each pass was given in the end, and a `with` for the time in which that is noted."""
    seen = []

    def note(_module, args, kwargs, _output):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    @contextmanager
    def noting():
        handle = denoiser.register_forward_hook(note, with_kwargs=True)
        yield
        handle.remove()

    return seen, noting()


def assert_same_and_corrected(theirs, ours, uncorrected):
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (theirs - uncorrected).norm() > 1e-2 * uncorrected.norm()


@pytest.mark.parametrize(
    "sampler, mode, guidance",
    [*((sampler, "state", 4.0) for sampler in SAMPLERS), ("euler", "noise", 4.0), ("ddim", "state", 1.0)],
)
def test_the_hook_does_what_our_loop_does(sampler, mode, guidance):
    pipeline, correction = corrected_pipeline(sampler, correction_mode=mode)
    plain = run(pipeline, guidance=guidance)
    with correction.hooked(PROMPTS) as hook:
        theirs = run(pipeline, guidance=guidance)
    assert_same_and_corrected(theirs, by_our_loop(correction, sampler, guidance), plain)
    assert len(hook.scores) == STEPS and all(scores.shape == (2,) for _, scores in hook.scores)


@pytest.mark.parametrize("sampler, guidance", [*((sampler, 4.0) for sampler in SAMPLERS), ("ddim", 1.0)])
def test_the_callback_does_what_our_loop_does_from_the_second_step_on(sampler, guidance):
    pipeline, correction = corrected_pipeline(sampler)
    plain = run(pipeline, guidance=guidance)
    callback = correction.callback(PROMPTS)
    theirs = run(pipeline, guidance=guidance, callback_on_step_end=callback)
    ours = by_our_loop(correction, sampler, guidance, correction_start=1 / STEPS)
    assert_same_and_corrected(theirs, ours, plain)
    timesteps = pipeline.scheduler.timesteps[1:].tolist()
    assert [timestep for timestep, _ in callback.scores] == timesteps


@pytest.mark.parametrize("how", ["hook", "callback"])
def test_several_images_a_prompt(how):
    pipeline, correction = corrected_pipeline()
    latents = noise_of(4)
    if how == "hook":
        with correction.hooked(PROMPTS, num_images_per_prompt=2):
            theirs = run(pipeline, latents=latents, num_images_per_prompt=2)
        changes = {}
    else:
        theirs = run(
            pipeline, latents=latents, num_images_per_prompt=2, callback_on_step_end=correction.callback(PROMPTS)
        )
        changes = {"correction_start": 1 / STEPS}
    each = [prompt for prompt in PROMPTS for _ in range(2)]
    ours = by_our_loop(correction, "ddim", prompts=each, latents=latents, **changes)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_start_end_and_every_count_the_pipelines_own_steps():
    pipeline, correction = corrected_pipeline(correction_start=0.2, correction_end=0.8, correction_every=2)
    schedule = pipeline.scheduler.timesteps.tolist()
    with correction.hooked(PROMPTS) as hook:
        run(pipeline)
    assert [timestep for timestep, _ in hook.scores] == [schedule[2]]
    callback = correction.callback(PROMPTS)
    run(pipeline, callback_on_step_end=callback)
    assert [timestep for timestep, _ in callback.scores] == [schedule[2]]


def test_image_to_image_counts_from_its_own_start():
    pipeline, _ = corrected_pipeline()
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    correction = SelfCorrection(image_to_image, tiny_adapter(tiny_backbone()), **RELATIVE, correction_every=2)
    settings = {"image": torch.zeros(1, 3, 32, 32), "strength": 0.75, "num_inference_steps": STEPS}
    callback = correction.callback("a star")
    image_to_image("a star", **settings, callback_on_step_end=callback)
    with correction.hooked("a star") as hook:
        image_to_image("a star", **settings)
    left = image_to_image.scheduler.timesteps.tolist()[1:]  # 3 of 4 steps are run
    assert [timestep for timestep, _ in hook.scores] == [left[0], left[2]]
    assert [timestep for timestep, _ in callback.scores] == [left[2]]


class PushAlong:
    """A score whose gradient is SHIFT, in place of the adapter's."""

    adapter = torch.nn.Identity()

    def __call__(self, z: torch.Tensor, t: torch.Tensor, text: TextStates) -> torch.Tensor:
        return (z * SHIFT).flatten(1).sum(1)


SHIFT = torch.zeros(1, 4, 8, 8)
SHIFT[0, 1, 2, 3] = 0.25


@pytest.mark.parametrize("how", ["hook", "callback"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_known_shift_of_the_state_reaches_the_final_latent(sampler, how):
    # A denoiser that always sees the same noise: z = a z_0 + s NOISE, and a shift of z by d is one of z_0 by d / a.
    pipeline, correction = corrected_pipeline(
        sampler, correct=1.0, correction_rule="fixed", correction_start=0.5, correction_end=0.6
    )
    correction.scorer = PushAlong()
    pipeline.unet.forward = lambda z, *args, **kwargs: (NOISE.expand_as(z),)
    plain = run(pipeline, ["a star"])
    if how == "hook":
        with correction.hooked("a star"):
            moved = run(pipeline, ["a star"])
    else:
        moved = run(pipeline, ["a star"], callback_on_step_end=correction.callback("a star"))
    alpha = pipeline.scheduler.alphas_cumprod[int(pipeline.scheduler.timesteps[2])]
    torch.testing.assert_close(moved - plain, SHIFT / alpha.sqrt(), rtol=2e-3, atol=1e-3)


def test_only_the_conditional_branch_sees_a_correction_of_the_noise():
    pipeline, correction = corrected_pipeline(correction_mode="noise")
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if len(args[0]) == 4 else None)
    with correction.hooked(PROMPTS):
        # this hook runs after the other one was registered, so it sees what the denoiser gets
        pipeline.unet.register_forward_pre_hook(
            lambda module, args: seen.append(args[0]) if len(args[0]) == 4 else None
        )
        run(pipeline)
    before, after = seen[0], seen[1]
    assert torch.equal(before[:2], after[:2]) and not torch.allclose(before[2:], after[2:], rtol=1e-3)


def test_a_score_pass_is_not_corrected_again():
    pipeline, correction = corrected_pipeline()
    sizes = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with correction.hooked(PROMPTS):
        run(pipeline)
    assert sizes == [4, 2] * STEPS  # the guided pass is announced, then the scoring one runs inside its hook


def test_what_fails_inside_leaves_no_hook_behind():
    pipeline, correction = corrected_pipeline()
    plain = run(pipeline)
    with pytest.raises(InputError, match="makes 2 images.*told of 1"), correction.hooked("a star"):
        run(pipeline)
    assert torch.equal(run(pipeline), plain)
    assert "step" not in vars(pipeline.scheduler)


def test_the_text_that_the_pipeline_really_feeds_is_the_judged_one():
    pipeline, correction = corrected_pipeline()
    text = tiny_backbone().encode_text(["a red circle"])
    seen = []
    features = correction.backbone.features
    correction.backbone.features = lambda z, t, text, taps: (seen.append(text), features(z, t, text, taps))[1]
    pipeline(
        prompt_embeds=text.tokens * 1.5, negative_prompt_embeds=text.tokens * 0, num_inference_steps=2,
        callback_on_step_end=correction.callback("a red circle"),
    )  # fmt: skip
    torch.testing.assert_close(seen[0].tokens, text.tokens * 1.5)
    torch.testing.assert_close(seen[0].pooled, text.pooled)


@pytest.mark.parametrize("how", ["hook", "callback"])
def test_inference_mode_is_one_clear_error(how):
    pipeline, correction = corrected_pipeline()
    with pytest.raises(InputError, match="torch.no_grad, not torch.inference_mode"), torch.inference_mode():
        if how == "callback":
            run(pipeline, callback_on_step_end=correction.callback(PROMPTS))
        with correction.hooked(PROMPTS):
            run(pipeline)


def test_half_precision_pipelines_keep_their_dtype():
    pipeline = tiny_pipeline().to(dtype=torch.bfloat16)
    correction = SelfCorrection(pipeline, tiny_adapter(tiny_backbone()), **RELATIVE)
    latents = noise_of().bfloat16()
    assert run(pipeline, latents=latents, callback_on_step_end=correction.callback(PROMPTS)).dtype == torch.bfloat16
    with correction.hooked(PROMPTS):
        assert run(pipeline, latents=latents).dtype == torch.bfloat16


def test_prompts_that_do_not_fit_the_images():
    pipeline, correction = corrected_pipeline()
    with pytest.raises(InputError, match="makes 2 images, but self-correction was given 3 prompts"):
        run(pipeline, callback_on_step_end=correction.callback(["a", "b", "c"]))
    with pytest.raises(InputError, match="at least one prompt"):
        correction.callback([])


@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_samplers_that_may_undo_a_shift_are_refused_for_the_state_only(name):
    pipeline, correction = corrected_pipeline()
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    with pytest.raises(InputError, match=f"survive {name}; set `pipeline.scheduler` to one of DDIMScheduler"):
        correction.callback("a star")
    noise = SelfCorrection(pipeline, correction.scorer.adapter, **RELATIVE, correction_mode="noise")
    plain = run(pipeline)
    with noise.hooked(PROMPTS):
        assert (run(pipeline) - plain).norm() > 1e-3 * plain.norm()
    with pytest.raises(InputError, match="a callback fires between steps"):
        noise.callback("a star")


def test_an_adapter_in_memory_must_fit():
    pipeline, other = tiny_pipeline(), tiny_adapter(tiny_backbone())
    wide = DiscriminativeAdapter(other.config, {"up1": 24}, 48, other.text_dim)
    with pytest.raises(InputError, match="reads the pooled text of width 48, base `.*` gives 32; use the base that it"):
        SelfCorrection(pipeline, wide, **RELATIVE)
    with pytest.raises(InputError, match="reads tap up1 of width 40, base `.*` gives 24"):
        T2IModel(tiny_backbone(), DiscriminativeAdapter(other.config, {"up1": 40}, 32, 32))
    made_for = tiny_backbone().fingerprint()
    made_for["architecture"] = made_for["architecture"] | {"text_width": 77}
    other.origin = AdapterOrigin(made_for, {})
    with pytest.raises(InputError, match="the adapter was made for base .*text_width 77.*, not for"):
        SelfCorrection(pipeline, other, **RELATIVE)


def test_offloading_by_layer_is_refused():
    pipeline, correction = corrected_pipeline()
    cpu_offload(pipeline.unet, execution_device=torch.device("cpu"))
    with pytest.raises(InputError, match="sequential offloading takes the denoiser's layers away"):
        correction.callback("a star")
    pipeline, correction = corrected_pipeline()
    apply_group_offloading(pipeline.unet, onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(InputError, match="group offloading.*enable_model_cpu_offload"), correction.hooked("a star"):
        pass


@pytest.mark.cuda
@pytest.mark.parametrize("how", ["hook", "callback"])
def test_whole_model_offload(how):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; tests/e2e/test_second_device.py does the same on one made of CPU memory")
    got, expected = offloaded_and_expected(how, "cuda")
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-2, atol=1e-2)  # other kernels, TF32 in convolutions


def offloaded_and_expected(how, device):
    """Latents of a corrected pipeline whose parts come to the device when they are called, and those of the CPU."""
    pipeline, correction = corrected_pipeline()
    expected = by_our_loop(correction, "ddim", correction_start=0.0 if how == "hook" else 1 / STEPS)
    pipeline.enable_model_cpu_offload(device=device)
    if how == "callback":
        return run(pipeline, callback_on_step_end=correction.callback(PROMPTS)), expected
    with correction.hooked(PROMPTS):
        return run(pipeline), expected


def test_settings_come_from_the_call_then_from_the_adapters_folder(tmp_path):
    pipeline, correction = corrected_pipeline()
    adapter, fingerprint = correction.scorer.adapter, correction.backbone.fingerprint()
    stored = {"correct": 0.03, "correction_rule": "relative", "correction_every": 2}
    save_adapter(adapter, tmp_path / "a", base_fingerprint=fingerprint, metadata={"correction": stored})
    assert SelfCorrection(pipeline, tmp_path / "a").config == CorrectionConfig(**stored)
    assert SelfCorrection(pipeline, adapter).config == CorrectionConfig(**stored), "in memory too"
    with pytest.raises(InputError, match="stored with the adapter is of another correction_rule; give `correct` too"):
        SelfCorrection(pipeline, tmp_path / "a", correction_rule="fixed")
    for name in ("correct", "correction_factor"):  # a strength that is given means what it says
        assert SelfCorrection(pipeline, adapter, **{name: 0.5}).config == CorrectionConfig(correct=0.5)
    assert SelfCorrection(pipeline, str(tmp_path / "a"), correction_every=3).config.correction_every == 3
    save_adapter(adapter, tmp_path / "b", base_fingerprint=fingerprint)
    with pytest.raises(InputError, match="needs a strength; give `correct`"):
        SelfCorrection(pipeline, tmp_path / "b")
    with pytest.raises(InputError, match="did you mean `correction_every`"):
        SelfCorrection(pipeline, adapter, correct=1.0, correction_evry=2)
    with pytest.raises(InputError, match="fused is for `dpt generate`"):
        SelfCorrection(pipeline, adapter, correct=1.0, correction_fused=True)


def test_pipelines_of_other_families_are_named():
    class StrangePipeline:
        pass

    with pytest.raises(InputError, match="class StrangePipeline are not supported; supported: StableDiffusionPipeline"):
        SelfCorrection(StrangePipeline(), tiny_adapter(tiny_backbone()), correct=1.0)


def test_it_is_an_export_of_the_package():
    assert dpt_t2i.SelfCorrection is SelfCorrection
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        dpt_t2i.Nothing  # noqa: B018


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_pipeline_in_half_precision_stays_in_it(sampler):
    pipeline, correction = corrected_pipeline(sampler)
    pipeline.to(dtype=torch.bfloat16)
    half = noise_of().to(torch.bfloat16)
    plain = run(pipeline, latents=half)
    with correction.hooked(PROMPTS):
        every_step = run(pipeline, latents=half)
    between = run(pipeline, latents=half, callback_on_step_end=correction.callback(PROMPTS))
    for made in (every_step, between):
        assert made.dtype == torch.bfloat16 and torch.isfinite(made).all()
        assert (made - plain).norm() > 1e-2 * plain.norm()


def test_a_forgotten_lora_is_told(caplog):
    pipeline, correction = corrected_pipeline()
    adapter = correction.scorer.adapter
    for lora in ("0123456789abcdef", None):
        adapter.origin = AdapterOrigin({**correction.backbone.fingerprint(), "lora": lora}, {})
        caplog.clear()
        SelfCorrection(pipeline, adapter, correct=1.0)
        assert ("together with a LoRA and the pipeline has none" in caplog.text) == (lora is not None)
    adapter.origin = AdapterOrigin({**correction.backbone.fingerprint(), "lora": "0123456789abcdef"}, {})
    add_lora(correction.backbone, 2)
    caplog.clear()
    SelfCorrection(pipeline, adapter, correct=1.0)
    assert "the pipeline has none" not in caplog.text


def test_a_call_that_ends_early_counts_from_the_schedules_begin():
    """SDXL's `denoising_end` leaves out the last steps, where image to image leaves out the first."""
    pipeline, correction = corrected_pipeline(correction_every=2)
    schedule = pipeline.scheduler.timesteps.tolist()

    class EndsEarly(type(pipeline)):
        num_timesteps = STEPS - 1  # as SDXL's pipeline says; the schedule itself is whole

    pipeline.__class__ = EndsEarly
    with correction.hooked(PROMPTS) as hook:
        run(pipeline)
    assert [timestep for timestep, _ in hook.scores][:2] == [schedule[0], schedule[2]]
    callback = correction.callback(PROMPTS)
    run(pipeline, callback_on_step_end=callback)
    assert [timestep for timestep, _ in callback.scores] == [schedule[2]]


def test_the_finished_latents_are_left_alone_though_the_last_timesteps_are_equal():
    """DPM++ rounds its timesteps: with Karras sigmas and many steps the last ones come out the same."""
    pipeline, _ = corrected_pipeline("dpm++")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    correction = SelfCorrection(pipeline, tiny_adapter(tiny_backbone()), **RELATIVE)
    steps = 100
    callback, handed = correction.callback(PROMPTS), []

    def watching(pipeline, index, timestep, tensors):
        before = tensors["latents"].clone()
        after = callback(pipeline, index, timestep, tensors)["latents"]
        handed.append(not torch.equal(before, after))
        return {"latents": after}

    pipeline(
        PROMPTS, latents=noise_of(), num_inference_steps=steps, output_type="latent", callback_on_step_end=watching,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    schedule = pipeline.scheduler.timesteps.tolist()
    assert schedule[-1] == schedule[-2], "what makes it hard"
    assert handed == [True] * (steps - 1) + [False]
    with correction.hooked(PROMPTS) as hook:
        pipeline(PROMPTS, latents=noise_of(), num_inference_steps=steps, output_type="latent")
    assert [timestep for timestep, _ in hook.scores] == schedule, "each step once"


def test_a_second_call_in_one_with_counts_anew():
    pipeline, correction = corrected_pipeline("euler", correction_end=0.5)
    with correction.hooked(PROMPTS) as hook:
        run(pipeline)
        run(pipeline)
    assert [timestep for timestep, _ in hook.scores] == pipeline.scheduler.timesteps.tolist()[:2] * 2


def test_a_denoiser_that_was_compiled_in_place(monkeypatch):
    pipeline, correction = corrected_pipeline()
    with correction.hooked(PROMPTS):
        plain = run(pipeline)
    pipeline.unet.compile(backend="eager")
    with correction.hooked(PROMPTS):
        torch.testing.assert_close(run(pipeline), plain, rtol=1e-5, atol=1e-5)


def test_another_tools_step_is_put_back():
    pipeline, correction = corrected_pipeline()
    theirs = pipeline.scheduler.step
    pipeline.scheduler.step = theirs
    with correction.hooked(PROMPTS):
        assert pipeline.scheduler.__dict__["step"] is not theirs
    assert pipeline.scheduler.__dict__["step"] is theirs


def test_one_correction_at_a_time():
    pipeline, correction = corrected_pipeline()
    inner = SelfCorrection(pipeline, tiny_adapter(tiny_backbone()), **RELATIVE)
    with correction.hooked(PROMPTS) as hook:
        with pytest.raises(InputError, match="corrected already; end the `with` of the other `hooked` first"):
            with inner.hooked(PROMPTS):
                pass
        run(pipeline)
    assert len(hook.scores) == STEPS


def test_a_correction_of_no_step_is_refused():
    pipeline, correction = corrected_pipeline(correction_start=0.9)
    with pytest.raises(InputError, match="start 0.5 is not before correction_end 0.5: no step would be corrected"):
        SelfCorrection(pipeline, tiny_adapter(tiny_backbone()), correction_start=0.5, correction_end=0.5, **RELATIVE)
    with pytest.raises(InputError, match="of 4 steps none is corrected between 0.9 and 1; widen that part"):
        with correction.hooked(PROMPTS):
            run(pipeline)
    first = SelfCorrection(pipeline, tiny_adapter(tiny_backbone()), correction_every=4, **RELATIVE)
    with first.hooked(PROMPTS) as hook:
        run(pipeline)
    assert len(hook.scores) == 1
    with pytest.raises(InputError, match=r"between 0 and 1 \(a callback fires after the first\)"):
        run(pipeline, callback_on_step_end=first.callback(PROMPTS))


def test_another_lora_than_the_adapters_is_told(tmp_path, caplog):
    """By diffusers' own loading too, which gives it another name."""
    backbone = tiny_backbone()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(backbone, 2)
        for parameter in lora_parameters(backbone):
            torch.nn.init.normal_(parameter)
    save_lora(backbone, tmp_path, {})
    base = {**backbone.fingerprint(), "lora": lora_hash(backbone.denoiser)}
    save_adapter(tiny_adapter(backbone), tmp_path / "adapter", base_fingerprint=base, metadata={})

    def told(pipeline):
        caplog.clear()
        SelfCorrection(pipeline, tmp_path / "adapter", **RELATIVE)
        return [r.message for r in caplog.records if "together with" in r.message]

    pipeline = tiny_pipeline()
    assert "pipeline has none: its score may mislead; call `pipeline.load_lora_weights`" in told(pipeline)[0]
    pipeline.load_lora_weights(tmp_path)
    assert told(pipeline) == []
    pipeline.disable_lora()
    assert "has it disabled: its score may mislead; call `pipeline.enable_lora`" in told(pipeline)[0]
    pipeline.enable_lora()
    lora_parameters(backbone_of(pipeline))[0].data[0, 0] += 1
    assert f"another LoRA ({base['lora']}) than the pipeline has" in told(pipeline)[0]


@pytest.mark.parametrize("mode", ["state", "noise"])
def test_of_a_pipeline_that_does_not_say_whether_it_guides_the_batch_does(mode, tmp_path):
    pipeline, adapter = of_family(save_pixart_sigma(tmp_path / "sigma"), "block0")
    correction = SelfCorrection(pipeline, adapter, correction_mode=mode, **RELATIVE)

    def draw(prompts, scale, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        how = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
        return pipeline(prompts, guidance_scale=scale, generator=generators, use_resolution_binning=False, **how)

    with correction.hooked(PROMPTS) as hook:
        draw(PROMPTS, 4.0, (0, 1))
        draw(PROMPTS, 1.0, (0, 1))
        draw(PROMPTS, 1.0, (0, 0))  # from one seed: equal before the first step alone
        assert [len(scores) for _, scores in hook.scores] == [2] * 9
        with pytest.raises(InputError, match="makes 1 image, but self-correction was told of 2"):
            draw(PROMPTS[:1], 4.0, (0,))
    with pytest.raises(InputError, match="makes 2 images, but self-correction was told of 1"):
        with correction.hooked(PROMPTS[:1]):
            draw(PROMPTS, 1.0, (0, 1))


def test_sd3s_pass_without_some_layers_is_corrected_as_the_step_is(tmp_path):
    pipeline, adapter = of_family(save_sd3(tmp_path / "sd3"), "block0")
    call = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent", "guidance_scale": 4.0}
    call |= {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    for mode in ("state", "noise"):
        correction = SelfCorrection(pipeline, adapter, correction_mode=mode, **RELATIVE)
        seen, handle = inputs_of(pipeline.transformer)
        with handle, correction.hooked("a star") as hook:
            pipeline("a star", generator=torch.Generator().manual_seed(0), **call)
        assert len(hook.scores) == 3, "each step once"
        drawn = [z for z in seen if not z.requires_grad]
        assert [len(z) for z in drawn] == [2, 2, 1, 2, 1]  # all layers are there in the first step
        for both, alone in ((drawn[1], drawn[2]), (drawn[3], drawn[4])):
            assert torch.equal(both[1:], alone), "the conditional branch's input"
            assert torch.equal(both[0], both[1]) == (mode == "state")


def test_of_flux_the_negative_branch_comes_by_itself(tmp_path):
    pipeline, adapter = of_family(save_flux(tmp_path / "flux"), "single0")
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent", "true_cfg_scale": 4.0}
    for mode in ("state", "noise"):
        correction = SelfCorrection(pipeline, adapter, correction_mode=mode, **RELATIVE)
        seen, handle = inputs_of(pipeline.transformer)
        with handle, correction.hooked("a star") as hook:
            pipeline("a star", negative_prompt="left", generator=torch.Generator().manual_seed(0), **call)
        assert len(hook.scores) == 2, "each step once"
        drawn = [z for z in seen if not z.requires_grad]
        assert len(drawn) == 4
        for positive, negative in zip(drawn[::2], drawn[1::2], strict=True):
            assert torch.equal(positive, negative) == (mode == "state")


def test_what_the_score_cannot_share_is_refused():
    adapter = tiny_adapter(tiny_backbone())
    pipeline = tiny_pipeline()
    pipeline.unet.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(InputError, match="has an IP-Adapter, .*unload_ip_adapter"):
        SelfCorrection(pipeline, adapter, **RELATIVE)
    pipeline = tiny_pipeline()
    correction = SelfCorrection(pipeline, adapter, **RELATIVE)
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(InputError, match="layerwise casting.* load it in one dtype"):
        correction.callback("a star")  # added since
    pipeline = tiny_pipeline()
    correction = SelfCorrection(pipeline, adapter, **RELATIVE)
    pipeline.unet.is_cache_enabled = True
    with pytest.raises(InputError, match="a cache of earlier steps, .*disable_cache"), correction.hooked("a star"):
        pass


def test_inpainting_is_corrected_and_a_denoiser_with_a_mask_among_its_inputs_is_not():
    pipeline, _ = corrected_pipeline()
    inpaint = diffusers.StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    correction = SelfCorrection(inpaint, tiny_adapter(tiny_backbone()), **RELATIVE)
    settings = {"image": torch.zeros(1, 3, 32, 32), "mask_image": torch.ones(1, 1, 32, 32), "num_inference_steps": 2}
    settings |= {"output_type": "latent", "height": 32, "width": 32}
    plain = inpaint("a star", generator=torch.Generator().manual_seed(0), **settings).images
    with correction.hooked("a star") as hook:
        moved = inpaint("a star", generator=torch.Generator().manual_seed(0), **settings).images
    assert len(hook.scores) == 2 and (moved - plain).norm() > 1e-2 * plain.norm()
    masked = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=9)
    inpaint = diffusers.StableDiffusionInpaintPipeline(
        **(pipeline.components | {"unet": masked}), requires_safety_checker=False
    )
    with pytest.raises(InputError, match="takes 9 channels and the VAE gives 4"):
        SelfCorrection(inpaint, tiny_adapter(tiny_backbone()), **RELATIVE)


def test_more_prompts_than_the_call_draws_are_refused_though_the_guided_batch_has_as_many_rows():
    """Two prompts told, one drawn: its two branches are no two images."""
    pipeline, correction = corrected_pipeline()
    with pytest.raises(InputError, match="makes 1 image, but self-correction was told of 2"):
        with correction.hooked(PROMPTS):
            run(pipeline, ["a star"])
    with correction.hooked(PROMPTS):  # without guidance a row is an image
        run(pipeline, guidance=1.0)


def test_more_images_than_were_told_are_refused_where_nothing_is_guided():
    """One prompt told, two images drawn: the second image's state is not the first's."""
    pipeline, correction = corrected_pipeline()
    with pytest.raises(InputError, match="makes 2 images, but self-correction was told of 1"):
        with correction.hooked(PROMPTS[:1]):
            run(pipeline, guidance=1.0)
