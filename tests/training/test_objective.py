"""The one batched pass of six evaluations against six passes written out."""

import math
from dataclasses import replace

import pytest
import torch

from dpt_t2i.adapter.score import match_score
from dpt_t2i.backbones.lora import add_lora
from dpt_t2i.backbones.types import Features
from dpt_t2i.config import DenoiseConfig, DistillConfig, ItmRecConfig
from dpt_t2i.data.examples import Examples, collate
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.objectives.itm import itm_loss
from dpt_t2i.objectives.rec import rec_losses
from dpt_t2i.training.denoising import Draw
from dpt_t2i.training.encode import Encoder
from dpt_t2i.training.objective import AtlasObjective, DenoiseObjective, ProbeObjective, TuneObjective, weights_of
from tests.tiny import read_apart, tiny_adapter, tiny_backbone


@pytest.fixture(scope="module")
def parts():
    backbone = tiny_backbone()
    taps = backbone.parse_taps("up1")
    adapter = tiny_adapter(backbone, "up1").eval()
    examples = Examples(SceneRecords(length=20, size=32), 32)
    whole = collate([examples[i] for i in range(20)])
    told = read_apart(whole.captions, whole.hard_captions)
    batch = collate([examples[i] for i in range(20) if told[i]][:3])
    encoded = Encoder(backbone, adapter.config.num_token_classes, None)(batch)
    generator = torch.Generator().manual_seed(0)
    draw = Draw(
        torch.randn(encoded.latents[:3].shape, generator=generator),
        torch.tensor([10, 500, 900]),
        torch.tensor([False, True, False]),
    )
    return backbone, taps, adapter, batch, encoded, draw


def by_hand(backbone, taps, adapter, batch, draw):
    """Six denoiser passes, each on its own, as the release does."""

    def read(images, texts, tokens=False):
        noisy = backbone.add_noise(backbone.encode_image(images), draw.noise, draw.timesteps)
        text = backbone.encode_text(list(texts))
        features: Features = backbone.features(noisy, draw.timesteps, text, taps)
        output = adapter(features, text.tokens, text.mask) if tokens else adapter(features)
        return output, match_score(output, text.pooled)

    positive = read(batch.images, batch.captions)[1]
    output = read(batch.images, batch.expressions, tokens=True)[0]
    i2t = [positive, read(batch.images, batch.hard_captions)[1], read(batch.images, batch.random_captions)[1]]
    t2i = [positive, read(batch.hard_images, batch.captions)[1], read(batch.random_images, batch.captions)[1]]
    return torch.stack(i2t, 1), torch.stack(t2i, 1), output


def test_one_pass_equals_six(parts):
    backbone, taps, adapter, batch, encoded, draw = parts
    with torch.no_grad():
        ours = ProbeObjective(backbone, adapter, taps, ItmRecConfig())(encoded, draw, float(batch.num_boxes()))
        i2t, t2i, output = by_hand(backbone, taps, adapter, batch, draw)
        theirs = itm_loss(i2t, t2i, output.logit_scale) | rec_losses(output, encoded.targets, batch.num_boxes())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hard", [True, False])
def test_many_taps_at_once_are_the_sum_of_each_alone(parts, hard):
    backbone, _, _, _, encoded, draw = parts
    first, second = tiny_adapter(backbone, "mid", seed=1), tiny_adapter(backbone, "up1", seed=2)
    with torch.no_grad():
        second.logit_scale.fill_(1.0)  # each has its own
    if not hard:
        encoded = replace(encoded, has_hard_caption=torch.tensor([True, False, True]))
    alone = []
    for tap, adapter in (("mid", first), ("up1", second)):
        terms = ProbeObjective(backbone, adapter, backbone.parse_taps(tap), ItmRecConfig())(encoded, draw, 3.0)
        sum(terms.values()).backward()
        gradients = [value.grad.clone() for value in adapter.parameters()]
        adapter.zero_grad()
        alone.append((terms, gradients))
    objective = AtlasObjective(backbone, {"mid": first, "up1": second}, backbone.parse_taps("mid_up1"), ItmRecConfig())
    assert {name.split(".")[1] for name, _ in objective.named_parameters()} == {"mid", "up1"}
    together = objective(encoded, draw, 3.0)
    for name, value in together.items():
        torch.testing.assert_close(value, alone[0][0][name] + alone[1][0][name], rtol=1e-5, atol=1e-6)
    sum(together.values()).backward()
    for adapter, (_, gradients) in zip((first, second), alone, strict=True):
        for value, want in zip(adapter.parameters(), gradients, strict=True):
            torch.testing.assert_close(value.grad, want, rtol=1e-4, atol=1e-6)


def test_stage_two_has_the_same_terms_and_the_denoising_one(parts):
    backbone, taps, adapter, batch, encoded, draw = parts
    boxes = float(batch.num_boxes())
    with torch.no_grad():
        probe = ProbeObjective(backbone, adapter, taps, ItmRecConfig())(encoded, draw, boxes)
        tune = TuneObjective(backbone, adapter, taps, ItmRecConfig(), DenoiseConfig())(encoded, draw, boxes)
        alone = DenoiseObjective(backbone, DenoiseConfig())(encoded, draw, boxes)
    torch.testing.assert_close(tune.pop("loss_mse"), alone["loss_mse"])
    for name, value in probe.items():
        torch.testing.assert_close(tune[name], value, rtol=1e-4, atol=1e-5)


def test_a_dropped_caption_is_denoised_with_the_empty_text(parts):
    backbone, _, _, batch, encoded, draw = parts
    latents = encoded.latents[:3]
    noisy = backbone.add_noise(latents, draw.noise, draw.timesteps)
    texts = [batch.captions[0], "", batch.captions[2]]  # draw.drop_caption
    with torch.no_grad():
        prediction, _ = backbone.predict(noisy, draw.timesteps, backbone.encode_text(texts))
        loss = DenoiseObjective(backbone, DenoiseConfig())(encoded, draw, 1.0)["loss_mse"]
    want = (prediction - backbone.target(latents, draw.noise, draw.timesteps)).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def errors_by_hand(backbone, latents, draw, captions):
    """Squared error of each noised latent [B, C, h, w] under a caption, one at a time."""
    errors = []
    for i, caption in enumerate(captions):
        latent, noise, t = latents[i : i + 1], draw.noise[i : i + 1], draw.timesteps[i : i + 1]
        seen = backbone.add_noise(latent, noise, t)
        prediction, _ = backbone.predict(seen, t, backbone.encode_text([caption]))
        errors.append((prediction - backbone.target(latent, noise, t)).square().mean())
    return torch.stack(errors)


def without(encoded, lacks):
    """Example 1 without its hard caption, its hard image, or the one being true of the other; None = with all."""
    there = torch.tensor([True, False, True])
    missing = {} if lacks in (None, "pair") else {f"has_hard_{lacks}": there}
    return encoded if lacks is None else replace(encoded, hard_pair=there, **missing)


@pytest.mark.parametrize("lacks", [None, "caption", "image", "pair"])
def test_each_picture_must_be_predicted_better_under_its_own_caption(parts, lacks):
    """t = 10 is below the lowest timestep asked, and counts as zero; so does what example 1 lacks."""
    backbone, taps, adapter, batch, encoded, draw = parts
    encoded = without(encoded, lacks)
    how = (backbone, adapter, taps, ItmRecConfig())
    asking = DenoiseConfig(denoise_itm_coef=2.0, denoise_itm_temperature=0.02, denoise_itm_min_timestep=500)
    with torch.no_grad():
        usual = TuneObjective(*how, DenoiseConfig())(encoded, draw, 3.0)
        found = TuneObjective(*how, asking)(encoded, draw, 3.0)
        sides = []
        for latents, own, wrong in (
            (encoded.latents[:3], batch.captions, batch.hard_captions),
            (encoded.latents[3:6], batch.hard_captions, batch.captions),
        ):
            right, false = (errors_by_hand(backbone, latents, draw, texts) for texts in (own, wrong))
            sides.append(-torch.sigmoid((false - right) / (0.02 * right)).log())
    text, image = sides
    want = text[1] + text[2] + image[1] + image[2]
    if lacks:
        want = want - image[1] - (text[1] if lacks == "caption" else 0)
    torch.testing.assert_close(found.pop("loss_denoise_itm"), want / 6, rtol=1e-3, atol=1e-5)
    assert found.keys() == usual.keys()
    for name, value in usual.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lacks", [None, "caption", "image", "pair"])
def test_without_an_adapter_matching_is_the_same(parts, lacks):
    backbone, taps, adapter, _, encoded, draw = parts
    encoded = without(encoded, lacks)
    asking = DenoiseConfig(denoise_itm_coef=2.0, denoise_itm_min_timestep=500)
    with torch.no_grad():
        alone = DenoiseObjective(backbone, asking)(encoded, draw, 3.0)
        beside = TuneObjective(backbone, adapter, taps, ItmRecConfig(), asking)(encoded, draw, 3.0)
    assert alone.keys() == {"loss_mse", "loss_denoise_itm"}
    for name, value in alone.items():
        torch.testing.assert_close(value, beside[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def tuned(parts):
    """The same base with a LoRA that does something."""
    backbone = tiny_backbone()
    torch.manual_seed(0)
    add_lora(backbone, rank=2)
    generator = torch.Generator().manual_seed(9)  # its own error at t = 10 is above the base's: it would count
    with torch.no_grad():
        for name, parameter in backbone.denoiser.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return backbone


@pytest.mark.parametrize("matching", [0.0, 2.0])
@pytest.mark.parametrize("lacks", [None, "image", "pair"])
def test_a_caption_must_prefer_its_picture_more_than_the_base_does(parts, tuned, lacks, matching):
    """The base's errors are those of a model that never had a LoRA. t = 10 is not asked."""
    plain, taps, adapter, batch, encoded, draw = parts
    encoded = without(encoded, lacks)
    asking = DenoiseConfig(
        denoise_dpo_coef=3.0, denoise_dpo_temperature=0.002, denoise_dpo_min_timestep=500, denoise_itm_coef=matching
    )
    with torch.no_grad():
        own, hard, own_plain, hard_plain = (
            errors_by_hand(backbone, latents, draw, batch.captions)
            for backbone in (tuned, plain)
            for latents in (encoded.latents[:3], encoded.latents[3:6])
        )
        for objective in (
            DenoiseObjective(tuned, asking),
            TuneObjective(tuned, adapter, taps, ItmRecConfig(), asking),
        ):
            found = objective(encoded, draw, 3.0)["loss_denoise_dpo"]
            won = ((own_plain - own) - (hard_plain - hard)) / (0.002 * own_plain)
            want = -torch.sigmoid(won).log()
            assert want[1:].sub(math.log(2)).abs().min() > 0.02  # the LoRA decides something
            torch.testing.assert_close(
                found, (want[2] + (0 if lacks == "image" else want[1])) / 3, rtol=2e-3, atol=1e-5
            )


def test_the_base_s_errors_take_no_gradient_and_the_lora_is_there_again(parts, tuned):
    _, _, _, _, encoded, draw = parts
    asking = DenoiseConfig(mse_loss_coef=0, denoise_dpo_coef=1.0, denoise_dpo_min_timestep=0)
    objective = DenoiseObjective(tuned, asking)
    for _ in range(2):  # the second time as the first
        objective(encoded, draw, 1.0)["loss_denoise_dpo"].backward()
        assert all(float(p.grad.norm()) > 0 for n, p in tuned.denoiser.named_parameters() if ".lora_B." in n)
        tuned.denoiser.zero_grad()


def gradients_of_b(cut, loss):
    """Norm of the gradient of each LoRA's B by its module (a fresh A gets none), for one of the losses."""
    backbone = tiny_backbone()
    torch.manual_seed(0)
    add_lora(backbone, rank=2)
    taps, adapter = backbone.parse_taps("up1"), tiny_adapter(backbone, "up1")
    examples = Examples(SceneRecords(length=20, size=32), 32)
    encoded = Encoder(backbone, adapter.config.num_token_classes, None)(collate([examples[0], examples[1]]))
    noise = torch.randn(encoded.latents[:2].shape, generator=torch.Generator().manual_seed(0))
    draw = Draw(noise, torch.tensor([100, 700]), torch.tensor([False, False]))
    behind = None if cut is None else backbone.taps[cut]
    terms = TuneObjective(backbone, adapter, taps, ItmRecConfig(), DenoiseConfig(), behind)(encoded, draw, 2.0)
    terms[loss].backward()
    return {
        name: 0.0 if parameter.grad is None else float(parameter.grad.norm())
        for name, parameter in backbone.denoiser.named_parameters()
        if ".lora_B." in name
    }


def test_the_denoising_gradient_is_cut_behind_a_block():
    """At up1: whole behind it; none for up1, the middle, and the level whose skips end in up1; else the skips."""
    whole, cut = gradients_of_b(None, "loss_mse"), gradients_of_b("up1", "loss_mse")
    for name, norm in whole.items():
        assert norm > 0
        if name.startswith(("up_blocks.1", "mid_block", "down_blocks.2")):
            assert cut[name] == 0
        elif name.startswith("down_blocks"):
            assert 0 < cut[name] != pytest.approx(norm, rel=1e-3)
        else:
            assert cut[name] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_share_of_the_gradient_of_itm_and_rec_reaches_the_lora(share):
    """LoRA: that of denoising and `share` of that of the adapter's losses; adapter: all of its own."""
    backbone = tiny_backbone()
    torch.manual_seed(0)
    parameters = add_lora(backbone, rank=2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    taps, adapter = backbone.parse_taps("up1"), tiny_adapter(backbone, "up1")
    examples = Examples(SceneRecords(length=20, size=32), 32)
    encoded = Encoder(backbone, adapter.config.num_token_classes, None)(collate([examples[0], examples[1]]))
    noise = torch.randn(encoded.latents[:2].shape, generator=torch.Generator().manual_seed(0))
    draw = Draw(noise, torch.tensor([100, 700]), torch.tensor([False, False]))

    def gradients(share, *left_out):
        how = (backbone, adapter, taps, ItmRecConfig(), DenoiseConfig(), None, None, share)
        terms = TuneObjective(*how)(encoded, draw, 2.0)
        learned = [*parameters, *(value for value in adapter.parameters())]
        total = sum(value for name, value in terms.items() if name not in left_out)
        found = torch.autograd.grad(total, learned, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(learned, found, strict=True)]

    whole, judged = gradients(1.0), gradients(1.0, "loss_mse")
    for index, (found, all_, own) in enumerate(zip(gradients(share), whole, judged, strict=True)):
        wanted = all_ - (1 - share) * own if index < len(parameters) else all_
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert any(value.abs().max() > 1e-4 for value in judged[: len(parameters)])


def test_the_cut_leaves_the_adapters_gradient_alone():
    whole, cut = gradients_of_b(None, "loss_i2t"), gradients_of_b("up1", "loss_i2t")
    assert whole == pytest.approx(cut, rel=1e-5)
    assert whole["up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.dpt.weight"] > 0


def test_evaluations_without_a_negative_are_left_out(parts):
    backbone, taps, adapter, batch, _, draw = parts
    none = torch.zeros(3, dtype=torch.bool)
    bare = replace(batch, has_hard_caption=none, has_hard_image=none)
    encoded = Encoder(backbone, adapter.config.num_token_classes, None)(bare)
    with torch.no_grad():
        terms = ProbeObjective(backbone, adapter, taps, ItmRecConfig())(encoded, draw, 3.0)
        i2t, t2i, output = by_hand(backbone, taps, adapter, batch, draw)
    two = torch.stack([i2t[:, 0], i2t[:, 2]], 1) * output.logit_scale
    torch.testing.assert_close(
        terms["loss_i2t"],
        torch.nn.functional.cross_entropy(two, torch.zeros(3, dtype=torch.long)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_weights_follow_the_config():
    loss = ItmRecConfig(itm_coef=2, ce_coef=3, bbox_coef=4, giou_coef=5, align_coef=6)
    denoise = DenoiseConfig(mse_loss_coef=7, denoise_itm_coef=8, denoise_dpo_coef=9)
    assert weights_of(loss, denoise, DistillConfig(distill_coef=10)) == {
        "loss_i2t": 2,
        "loss_t2i": 2,
        "loss_ce": 3,
        "loss_bbox": 4,
        "loss_giou": 5,
        "loss_align": 6,
        "loss_mse": 7,
        "loss_denoise_itm": 8,
        "loss_denoise_dpo": 9,
        "loss_distill": 10,
    }


def test_no_object_class_and_temperature_are_those_of_the_config(parts):
    backbone, taps, adapter, batch, encoded, draw = parts
    loss = ItmRecConfig(eos_coef=0.3, align_temperature=0.2)
    with torch.no_grad():
        terms = ProbeObjective(backbone, adapter, taps, loss)(encoded, draw, 3.0)
        _, _, output = by_hand(backbone, taps, adapter, batch, draw)
        want = rec_losses(output, encoded.targets, 3.0, eos_coef=0.3, temperature=0.2)
        usual = rec_losses(output, encoded.targets, 3.0)
    for name in ("loss_ce", "loss_align"):
        torch.testing.assert_close(terms[name], want[name], rtol=1e-4, atol=1e-5)
        assert (want[name] - usual[name]).abs() > 1e-3
