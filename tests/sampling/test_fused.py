"""The fused correction: its gradient comes from the pass that predicts, and its shift reaches the next latent."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dpt_t2i.config import CorrectionConfig, SampleConfig
from dpt_t2i.errors import InputError
from dpt_t2i.sampling import loop
from dpt_t2i.sampling.correct import correct, predict_and_correct
from dpt_t2i.sampling.loop import Step, check_correction, sample
from dpt_t2i.sampling.schedulers import make_scheduler
from dpt_t2i.sampling.scoring import MatchScorer
from tests.sampling.stubs import NOISE, ConstantNoise, states
from tests.tiny import tiny_adapter, tiny_backbone

SHIFT = torch.zeros(1, 4, 8, 8)
SHIFT[0, 1, 2, 3] = 0.25
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([500, 500])


class PushAlong:
    """A score with the gradient SHIFT, beside the prediction of `ConstantNoise`."""

    def __call__(self, z, t, text):
        return (z * SHIFT).flatten(1).sum(1)

    def predict_and_score(self, z, t, text, scored):
        return NOISE.expand_as(z), self(z[-scored:], t[-scored:], text)


class CountedPushAlong(PushAlong):
    """The same, whose passes are seen as those of the backbone."""

    def __init__(self, backbone):
        self.backbone = backbone

    def predict_and_score(self, z, t, text, scored):
        self.backbone.seen.append(z)
        return super().predict_and_score(z, t, text, scored)


def final(name: str, on_step=None, **settings) -> torch.Tensor:
    correction = CorrectionConfig(correct=1.0, correction_fused=True, **settings)
    sampling = SampleConfig(steps=10, guidance_scale=3.0, scheduler=name)
    return sample(ConstantNoise(), states(1), states(1), LATENTS[:1], sampling, correction, PushAlong(), on_step)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++", "unipc"])
def test_the_shift_of_one_step_reaches_the_next_latent(name):
    steps: list[Step] = []
    plain = sample(
        ConstantNoise(), states(1), states(1), LATENTS[:1], SampleConfig(steps=10, scheduler=name), CorrectionConfig()
    )
    moved = final(name, steps.append, correction_start=0.4, correction_end=0.45) - plain
    assert [step.index for step in steps if step.scores is not None] == [4]
    # z = a z_0 + s NOISE: moving z by d at the *next* step moves z_0 by d / a of that step (tests of the samplers).
    schedule = make_scheduler(ConstantNoise(), name, 10)
    alpha = ConstantNoise().pipeline.scheduler.alphas_cumprod[int(schedule.timesteps[5])]
    torch.testing.assert_close(moved, SHIFT / alpha.sqrt(), rtol=2e-3, atol=2e-4)


def test_steps_outside_the_guided_part_score_too():
    steps: list[Step] = []
    backbone, correction = ConstantNoise(), CorrectionConfig(correct=1.0, correction_fused=True)
    sampling = SampleConfig(steps=4, guidance_start=0.25, guidance_end=0.5)
    sample(backbone, states(1), states(1), LATENTS[:1], sampling, correction, CountedPushAlong(backbone), steps.append)
    assert [len(z) for z in backbone.seen] == [1, 2, 1, 1]
    assert [step.scores is None for step in steps] == [False] * 3 + [True]


def test_after_the_last_step_nothing_is_left_to_correct():
    steps: list[Step] = []
    final("ddim", steps.append)
    assert [step.scores is None for step in steps] == [False] * 9 + [True]


@pytest.mark.parametrize("taps", ["up1", "bottom0_up1"])
def test_prediction_and_correction_are_those_of_two_passes(taps):
    backbone = tiny_backbone()
    scorer = MatchScorer(backbone, tiny_adapter(backbone, taps), backbone.parse_taps(taps))
    text, null = backbone.encode_text(["a red circle", "two blue stars"]), backbone.null_text(2)
    with torch.no_grad():
        prediction, moved, scores = predict_and_correct(LATENTS, TIMESTEPS, text, null, scorer=scorer, strength=100.0)
        assert not torch.is_grad_enabled()
    expected, expected_scores = correct(LATENTS, TIMESTEPS, text, score=scorer, strength=100.0)
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(scores, expected_scores)
    assert not torch.allclose(moved, LATENTS, atol=1e-3)
    for rows, texts in ((prediction[:2], null), (prediction[2:], text)):
        torch.testing.assert_close(rows, backbone.predict(LATENTS, TIMESTEPS, texts)[0])


def test_no_graph_is_recorded_behind_the_tap():
    backbone = tiny_backbone()
    scorer = MatchScorer(backbone, tiny_adapter(backbone), backbone.parse_taps("up1"))
    graph = {}
    for name in ("up_blocks.1", "up_blocks.2", "up_blocks.3"):
        backbone.denoiser.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: graph.update({name: output.requires_grad})
        )
    point = LATENTS.clone().requires_grad_(True)
    text = backbone.encode_text(["a star"] * 2)
    prediction, scores = scorer.predict_and_score(point, TIMESTEPS, text, 2)
    assert graph == {"up_blocks.1": True, "up_blocks.2": False, "up_blocks.3": False}
    assert scores.requires_grad and not prediction.requires_grad
    assert torch.is_grad_enabled()


class Operations(TorchDispatchMode):
    """Multiplications and additions of products and convolutions; torch's own counter cannot follow `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def test_operations_of_a_corrected_step():
    """A standard correction costs a pass to the tap and the way back. A fused one saves the pass, and goes back through
    the unconditional branch as well, whose rows share the graph: fewer calls, and no more arithmetic."""
    backbone = tiny_backbone()
    scorer = MatchScorer(backbone, tiny_adapter(backbone), backbone.parse_taps("up1"))
    text, null = backbone.encode_text(["a star"]), backbone.null_text(1)

    def operations(run) -> int:
        with Operations() as counter:
            run()
        return counter.total

    def two_steps(**settings) -> int:
        # The last step of a fused run is not corrected: two steps, of which the first is.
        how = CorrectionConfig(**settings, correction_end=0.5)
        return operations(lambda: sample(backbone, text, null, LATENTS[:1], SampleConfig(steps=2), how, scorer))

    with torch.no_grad():
        to_tap = operations(lambda: backbone.features(LATENTS[:1], TIMESTEPS[:1], text, scorer.taps))
        scoring = operations(lambda: scorer(LATENTS[:1], TIMESTEPS[:1], text))
    plain, standard, fused = two_steps(), two_steps(correct=1.0), two_steps(correct=1.0, correction_fused=True)
    adapter = scoring - to_tap
    # The way back costs what the way there does: the gradient of a weight, as dear again, is computed nowhere.
    assert scoring < standard - plain <= 2.1 * scoring
    assert fused - plain <= 2.1 * (to_tap + adapter)
    assert fused <= standard


def test_mode_noise_and_scorers_that_cannot_predict_are_refused():
    with pytest.raises(InputError, match="`correction_fused`.*needs `correction_mode` state"):
        final("ddim", correction_mode="noise")
    backbone = tiny_backbone()
    text, null = backbone.encode_text(["a star", "two blue stars"]), backbone.null_text(2)
    correction = CorrectionConfig(correct=0.1, correction_fused=True)

    def plain_function(noisy, timesteps, states):
        return noisy.flatten(1).sum(1)

    with pytest.raises(InputError, match="`correction_fused` reads the score off .* give a `MatchScorer`"):
        sample(backbone, text, null, LATENTS, SampleConfig(steps=2), correction, plain_function)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_a_fused_step_predicts_what_a_plain_one_does(guidance):
    backbone = tiny_backbone()
    scorer = MatchScorer(backbone, tiny_adapter(backbone), backbone.parse_taps("up1"))
    text, null = backbone.encode_text(["a star", "two blue stars"]), backbone.null_text(2)
    settings = SampleConfig(steps=3, guidance_scale=guidance)

    def run(**correction) -> torch.Tensor:
        return sample(backbone, text, null, LATENTS, settings, CorrectionConfig(**correction), scorer)

    plain = run()
    torch.testing.assert_close(run(correct=1e-12, correction_fused=True), plain, rtol=1e-5, atol=1e-5)
    relative = {"correct": 0.1, "correction_rule": "relative"}
    fused, standard = run(**relative, correction_fused=True), run(**relative)
    assert all((one - other).norm() > 1e-2 * plain.norm() for one, other in ((fused, plain), (fused, standard)))


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_branches_one_after_the_other_give_the_same_for_less_of_the_way_back(monkeypatch, guidance):
    backbone = tiny_backbone()
    scorer = MatchScorer(backbone, tiny_adapter(backbone), backbone.parse_taps("up1"))
    text, null = backbone.encode_text(["a star", "two blue stars"]), backbone.null_text(2)
    correction = CorrectionConfig(correct=0.1, correction_rule="relative", correction_fused=True)

    def run(apart_from: int) -> tuple[torch.Tensor, int]:
        monkeypatch.setattr(loop, "APART_FROM", apart_from)
        with Operations() as counter:
            final = sample(
                backbone, text, null, LATENTS, SampleConfig(steps=3, guidance_scale=guidance), correction, scorer
            )
        return final, counter.total

    (together, many), (apart, fewer) = run(65), run(64)  # the tiny latents have 8 x 8 places
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)
    assert (fewer < 0.9 * many) if guidance > 1 else (fewer == many)


def test_of_the_last_step_alone_there_is_nothing_to_move():
    last = CorrectionConfig(correct=0.1, correction_start=0.75, correction_fused=True)
    with pytest.raises(
        InputError, match=r"of 4 steps none .* 0.75 and 1 \(fused: it moves the latent of the step after"
    ):
        check_correction(last, SampleConfig(steps=4))
    check_correction(last.model_copy(update={"correction_fused": False}), SampleConfig(steps=4))
    check_correction(last, SampleConfig(steps=8))
