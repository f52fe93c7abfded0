"""The teacher's prediction and the loss against it, each written out a second way."""

from pathlib import Path

import pytest
import torch

from dpt_t2i.adapter.score import match_score
from dpt_t2i.adapter.types import AdapterOrigin
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.lora import add_lora, lora_parameters
from dpt_t2i.config import DenoiseConfig, DistillConfig, ItmRecConfig
from dpt_t2i.data.examples import Examples, collate
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError
from dpt_t2i.sampling.scoring import MatchScorer
from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.distill import Teacher, _change
from dpt_t2i.training.encode import Encoder
from dpt_t2i.training.objective import TuneObjective
from dpt_t2i.training.probe import run_probe
from dpt_t2i.training.trackers import read_metrics
from dpt_t2i.training.tune import run_tune
from tests.families import FAMILIES
from tests.tiny import read_apart, tiny_adapter, tiny_backbone

SETTINGS = DistillConfig(distill_coef=1.0, distill_strength=0.2, distill_min_timestep=500)
TEXTS = ["a red circle", "a blue square", "two green star"]


def teacher_on(backbone, settings=SETTINGS):
    return Teacher(backbone, MatchScorer(backbone, tiny_adapter(backbone), backbone.parse_taps("up1")), settings)


def moved_loras(backbone):
    """A LoRA that changes something."""
    torch.manual_seed(1)
    add_lora(backbone, rank=2)
    with torch.no_grad():
        for parameter in lora_parameters(backbone):
            parameter.normal_(std=0.3)


@pytest.mark.parametrize(("kind", "factor"), [("epsilon", "alpha"), ("v_prediction", "one"), ("sd3", "one")])
def test_a_push_of_the_clean_latent_as_a_change_of_the_prediction(kind: str, factor: str, tmp_path: Path) -> None:
    """At fixed z: noise goes down by alpha p, and v and the flow's velocity by p (alpha^2 + sigma^2 = 1; 1 - t + t)."""
    backbone = load_backbone(FAMILIES[kind](tmp_path / kind), device="cpu") if kind in FAMILIES else tiny_backbone(kind)
    torch.manual_seed(0)
    clean, noise, push = torch.randn(3, 2, backbone.latent_channels, 8, 8).unbind()
    steps = torch.tensor([300, 800])
    alpha, sigma = (backbone.add_noise(*pair, steps)[:, :1, :1, :1] for pair in _units(clean))
    change = _change(backbone, push, steps)
    after = backbone.target(clean + sigma * push, noise - alpha * push, steps)
    torch.testing.assert_close(change, after - backbone.target(clean, noise, steps), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change, -push * (alpha if factor == "alpha" else 1.0), rtol=1e-4, atol=1e-5)


def _units(like):
    one, none = torch.ones_like(like), torch.zeros_like(like)
    return (one, none), (none, one)


def test_the_teacher_climbs_the_score_of_the_plain_base() -> None:
    backbone = tiny_backbone()
    text = backbone.encode_text(TEXTS)
    noisy = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([499, 500, 900])
    teacher = teacher_on(backbone)
    plain, features = backbone.predict(noisy.requires_grad_(), steps, text, backbone.parse_taps("up1"))
    match_score(teacher.scorer.adapter.match_embeds(features), text.pooled).sum().backward()
    direction = noisy.grad / noisy.grad.flatten(1).norm(dim=1)[:, None, None, None]
    push = 0.2 * noisy.flatten(1).norm(dim=1)[:, None, None, None] * direction
    alpha = backbone.pipeline.scheduler.alphas_cumprod[steps].sqrt()[:, None, None, None]
    wanted = plain - torch.tensor([0.0, 1.0, 1.0])[:, None, None, None] * alpha * push
    moved_loras(backbone)
    found = teacher(noisy.detach(), steps, text)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-5)
    assert not found.requires_grad and all(parameter.requires_grad for parameter in lora_parameters(backbone))
    with torch.no_grad():
        assert not torch.allclose(backbone.predict(noisy, steps, text)[0], plain, atol=1e-3), "the LoRA is on again"


@pytest.fixture
def parts():
    backbone = tiny_backbone()
    adapter = tiny_adapter(backbone)
    examples = Examples(SceneRecords(length=20, size=32), 32)
    whole = collate([examples[i] for i in range(20)])
    told = read_apart(whole.captions, whole.hard_captions)
    batch = collate([examples[i] for i in range(20) if told[i]][:3])
    encoded = Encoder(backbone, adapter.config.num_token_classes, None)(batch)
    noise = torch.randn(encoded.latents[:3].shape, generator=torch.Generator().manual_seed(0))
    return (
        backbone,
        adapter,
        batch,
        encoded,
        Draw(noise, torch.tensor([10, 500, 900]), torch.tensor([False, True, False])),
    )


def test_the_loss_asks_of_right_and_wrong_captions_alike(parts) -> None:
    backbone, adapter, batch, encoded, draw = parts
    moved_loras(backbone)
    taps, teacher = backbone.parse_taps("up1"), teacher_on(backbone)
    how = (backbone, adapter, taps, ItmRecConfig(), DenoiseConfig())
    with torch.no_grad():
        without = TuneObjective(*how)(encoded, draw, 3.0)
        found = TuneObjective(*how, None, teacher)(encoded, draw, 3.0)
        noisy = backbone.add_noise(encoded.latents[:3], draw.noise, draw.timesteps)
        errors = []
        for captions in (batch.captions, batch.hard_captions, batch.random_captions):
            text = backbone.encode_text(list(captions))
            wanted = teacher(noisy, draw.timesteps, text)
            errors.append((backbone.predict(noisy, draw.timesteps, text)[0] - wanted).square().mean())
    assert bool(batch.has_hard_caption.all())
    torch.testing.assert_close(found.pop("loss_distill"), torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)
    for name, value in without.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    both = (backbone, adapter, taps, ItmRecConfig(), DenoiseConfig(denoise_itm_coef=1.0))  # asks for more predictions
    with torch.no_grad():
        found = TuneObjective(*both, None, teacher)(encoded, draw, 3.0)
    torch.testing.assert_close(found["loss_distill"], torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


def test_a_fresh_lora_is_a_push_away(parts) -> None:
    """Its prediction is the base's, so the loss is the mean square of the push: 0 below the lowest timestep."""
    backbone, adapter, _, encoded, draw = parts
    add_lora(backbone, rank=2)
    teacher = teacher_on(backbone, SETTINGS.model_copy(update={"distill_min_timestep": 901}))
    objective = TuneObjective(
        backbone, adapter, backbone.parse_taps("up1"), ItmRecConfig(), DenoiseConfig(), None, teacher
    )
    assert objective(encoded, draw, 3.0)["loss_distill"].item() == pytest.approx(0.0, abs=1e-9)
    teacher.config = SETTINGS.model_copy(update={"distill_min_timestep": 0})
    alpha2 = backbone.pipeline.scheduler.alphas_cumprod[draw.timesteps]
    with torch.no_grad():
        noisy = backbone.add_noise(encoded.latents[:3], draw.noise, draw.timesteps)
    size = (0.2**2 * noisy.square().flatten(1).mean(1) * alpha2).mean()
    assert objective(encoded, draw, 3.0)["loss_distill"].item() == pytest.approx(size.item(), rel=1e-4)


def test_a_gradient_that_is_not_finite_is_a_loss_that_is_not(parts) -> None:
    backbone, adapter, _, encoded, draw = parts
    encoded.latents[1] = torch.nan
    objective = TuneObjective(
        backbone,
        adapter,
        backbone.parse_taps("up1"),
        ItmRecConfig(),
        DenoiseConfig(),
        teacher=teacher_on(backbone),
    )
    assert not objective(encoded, draw, 3.0)["loss_distill"].isfinite()  # and the engine has its say, on all processes


def test_stage_two_learns_it_and_goes_on_after_a_stop(probe_config, tune_config, tmp_path) -> None:
    probe = probe_config()
    run_probe(probe)
    settings = {
        "adapter": str(probe.output_dir),
        "distill_coef": 2.0,
        "distill_min_timestep": 0,
        "checkpointing_steps": 1,
    }
    whole = tune_config(**settings, output_dir=str(tmp_path / "whole"))
    run_tune(whole)
    (row,) = [row for row in read_metrics(whole.output_dir / "metrics.jsonl") if row["split"] == "train"]
    parts = {"loss_i2t": 1, "loss_t2i": 1, "loss_ce": 1, "loss_bbox": 5, "loss_giou": 2, "loss_align": 1, "loss_mse": 1}
    assert row["loss_distill"] > 0
    weighted = sum(weight * row[name] for name, weight in parts.items()) + 2 * row["loss_distill"]
    assert row["loss"] == pytest.approx(weighted, rel=1e-4)
    lora = (whole.output_dir / "pytorch_lora_weights.safetensors").read_bytes
    before = lora()
    run_tune(tune_config(**settings, output_dir=str(tmp_path / "whole"), resume_from_checkpoint="checkpoint-1"))
    assert lora()[-4096:] == before[-4096:], "the teacher is the adapter that the run began with, not the learned one"


def test_a_tuned_start_needs_the_plain_bases_adapter(probe_config, tune_config, tmp_path) -> None:
    probe = probe_config()
    run_probe(probe)
    first = tune_config(adapter=str(probe.output_dir))
    run_tune(first)
    again = {
        "adapter": str(first.output_dir),
        "lora": str(first.output_dir),
        "distill_coef": 1.0,
        "output_dir": str(tmp_path / "again"),
    }
    with pytest.raises(InputError, match="learned with one; give --distill_adapter"):
        run_tune(tune_config(**again))
    run_tune(tune_config(**again, distill_adapter=str(probe.output_dir)))
    with pytest.raises(InputError, match="no adapter in .*nowhere"):
        run_tune(tune_config(**again | {"output_dir": str(tmp_path / "b")}, distill_adapter=str(tmp_path / "nowhere")))


def test_an_adapter_that_learned_with_a_lora_is_no_teacher_of_the_plain_base(tune_config) -> None:
    backbone, adapter = tiny_backbone(), tiny_adapter(tiny_backbone())
    taps = backbone.parse_taps("up1")
    config = tune_config(distill_coef=1.0)
    adapter.origin = AdapterOrigin({**backbone.fingerprint(), "lora": None}, {})
    assert Teacher.of(config, backbone, adapter, taps) is not None
    adapter.origin = AdapterOrigin({**backbone.fingerprint(), "lora": "0123456789abcdef"}, {})
    with pytest.raises(InputError, match="an adapter that learned with one; give --distill_adapter"):
        Teacher.of(config, backbone, adapter, taps)


def test_the_teacher_learns_nothing_with_the_adapter(tune_config) -> None:
    backbone = tiny_backbone()
    adapter = tiny_adapter(backbone)
    teacher = Teacher.of(tune_config(distill_coef=1.0), backbone, adapter, backbone.parse_taps("up1"))
    text, steps = backbone.encode_text(TEXTS[:1]), torch.tensor([900])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = teacher(noisy, steps, text)
    with torch.no_grad():
        for parameter in adapter.parameters():
            assert parameter.requires_grad
            parameter.add_(torch.randn_like(parameter))
    torch.testing.assert_close(teacher(noisy, steps, text), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in teacher.scorer.adapter.parameters())


@pytest.mark.parametrize("objective", ["denoise_only", "denoise_itm"])
def test_without_an_adapter_there_is_no_teacher(tune_config, objective: str) -> None:
    matching = 1.0 if objective == "denoise_itm" else 0.0
    with pytest.raises(InputError, match=f"objective {objective} has no teacher: leave out distill_coef"):
        run_tune(tune_config(objective=objective, denoise_itm_coef=matching, distill_coef=1.0))


def test_with_fsdp_it_is_refused(monkeypatch, tune_config) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    backbone = tiny_backbone()
    with pytest.raises(InputError, match="distill_coef does not go with FSDP"):
        Teacher.of(tune_config(distill_coef=1.0), backbone, tiny_adapter(backbone), backbone.parse_taps("up1"))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert Teacher.of(tune_config(), backbone, tiny_adapter(backbone), backbone.parse_taps("up1")) is None
