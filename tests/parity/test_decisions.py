"""Where method and release part (docs/deviations.md): both numbers, for what needs no large golden."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from dpt_t2i.adapter.model import DiscriminativeAdapter
from dpt_t2i.adapter.official import adapter_from_official, sort_official
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.loading import load_backbone
from dpt_t2i.backbones.types import Features, TextStates
from dpt_t2i.config import CorrectionConfig, SampleConfig, TuneTrainConfig
from dpt_t2i.data.examples import Examples, View
from dpt_t2i.data.records import Record
from dpt_t2i.data.transforms import fit_square
from dpt_t2i.objectives.denoise import denoise_loss
from dpt_t2i.objectives.matcher import match_queries
from dpt_t2i.objectives.rec import rec_losses
from dpt_t2i.objectives.types import GroundingTargets
from dpt_t2i.sampling.loop import Step, sample
from dpt_t2i.sampling.noise import initial_noise
from dpt_t2i.sampling.schedulers import make_scheduler
from dpt_t2i.training.engine import _rate_factor
from tests.tiny import tiny_backbone, tiny_pipeline

GOLDEN = load_file(Path(__file__).parent / "adapter.safetensors")
PREFIX = "checkpoint."
STATE = sort_official({k.removeprefix(PREFIX): v.clone() for k, v in GOLDEN.items() if k.startswith(PREFIX)}).adapter
FEATURES = Features({"up1": GOLDEN["features.up1"]}, GOLDEN["timesteps"])


@torch.no_grad()
def test_features_are_normalised_unless_imported() -> None:
    imported, _ = adapter_from_official(STATE, {"up1": 40}, num_heads=4)
    torch.testing.assert_close(imported(FEATURES).match_embeds, GOLDEN["up1.q_emb_matching"][0], rtol=1e-4, atol=2e-5)
    config = imported.config.model_copy(update={"normalize_features": True})
    ours = DiscriminativeAdapter(config, {"up1": 40}, 64, 48).eval()
    ours.load_state_dict(imported.state_dict(), strict=False)  # all but the norm, which starts as the identity
    difference = (ours(FEATURES).match_embeds - GOLDEN["up1.q_emb_matching"][0]).abs().max()
    assert float(difference) > 1e-3


@torch.no_grad()
def test_of_several_decoder_layers_the_last_matches() -> None:
    """The release's matching reads layer 0: the same as if the second layer were not there."""
    second = {
        key.replace("decoder.layers.0", "decoder.layers.1"): 0.5 * value
        for key, value in STATE.items()
        if key.startswith("transformer.decoder.layers.0")
    }
    one, _ = adapter_from_official(STATE, {"up1": 40}, num_heads=4)
    two, _ = adapter_from_official(STATE | second, {"up1": 40}, num_heads=4)
    assert two.config.dec_layers == 2
    torch.testing.assert_close(one(FEATURES).match_embeds, GOLDEN["up1.q_emb_matching"][0], rtol=1e-4, atol=2e-5)
    assert float((two(FEATURES).match_embeds - GOLDEN["up1.q_emb_matching"][0]).abs().max()) > 1e-3


def test_the_cosine_reaches_its_end() -> None:
    """The release makes the schedule 8 times longer than the steps it takes on one GPU: it ends at 96 % of the rate."""
    settings = TuneTrainConfig()
    steps, accumulation = settings.max_train_steps, settings.gradient_accumulation_steps
    theirs = 0.5 * (1 + math.cos(math.pi * steps / (steps * accumulation)))
    assert theirs == pytest.approx(0.962, abs=1e-3)
    assert _rate_factor(settings)(steps - 1) < 1e-6 and _rate_factor(settings)(steps // 2) == pytest.approx(0.5)


def test_a_picture_is_not_squashed() -> None:
    """A box 20 x 20 of a 64 x 32 picture: squashed to 32 x 32 it is 10 wide and 20 high; ours stays square."""
    square, boxes = fit_square(Image.new("RGB", (64, 32)), [(22.0, 6.0, 20.0, 20.0)], 32)
    theirs = (20 / 64 * 32, 20 / 32 * 32)
    assert theirs == (10.0, 20.0)
    assert square.size == (32, 32) and (boxes[0, 2:] * 32).tolist() == pytest.approx([20.0, 20.0])


def test_a_flip_cannot_turn_bright_into_bleft() -> None:
    """The release swaps substrings, so that 58 prompts of ABC-6K lose a word; here a text is never changed: "bright" is
    mirrored as it stands, and where a text names a side nothing is."""
    assert "a bright bus".replace("right", "left") == "a bleft bus"
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # a column tells whether it was mirrored

    def shown(caption: str) -> tuple[set[str], set[float]]:
        records = [Record(str(i), "toy", lambda: ramp, (caption,)) for i in range(2)]
        items = [Examples(records, 16, view=View(random_flip=True)).item(epoch, 0) for epoch in range(16)]
        return {item.caption for item in items}, {round(float(item.pixels[0, 0, 0]), 3) for item in items}

    captions, corners = shown("a bright bus")
    assert captions == {"a bright bus"} and len(corners) == 2
    captions, corners = shown("a bus on the right")
    assert captions == {"a bus on the right"} and len(corners) == 1


def test_min_snr_of_a_predicted_velocity() -> None:
    """The release weighs v as it weighs noise: min(SNR, gamma) / SNR. By hand, gamma 5: SNR 8 and 2, errors 1 and 4."""
    snr, prediction = torch.tensor([8.0, 2.0]), torch.tensor([[1.0], [2.0]])
    theirs = (5 / 8 * 1 + 2 / 2 * 4) / 2
    ours = (5 / 9 * 1 + 2 / 3 * 4) / 2
    given = {"snr": snr, "snr_gamma": 5.0}
    zeros = torch.zeros(2, 1)
    assert float(denoise_loss(prediction, zeros, **given)) == pytest.approx(theirs)  # of predicted noise both agree
    assert float(denoise_loss(prediction, zeros, **given, prediction_type="v_prediction")) == pytest.approx(ours)
    # An error of v is one of the clean latent times SNR + 1, of noise times SNR: so the same weight on that latent.
    assert theirs == pytest.approx((5 * (1 / 8) + 2 * (4 / 2)) / 2)
    assert ours == pytest.approx((5 * (1 / 9) + 2 * (4 / 3)) / 2)


def test_an_example_without_a_box_teaches_nothing() -> None:
    """The release teaches "no object" to all unmatched queries, also of a text that names no box."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)  # 2 examples, 3 queries, 4 token positions and "no object"
    box, row = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[1.0, 0, 0, 0, 0]])
    output = AdapterOutput(
        match_embeds=torch.zeros(2, 1, 4),
        logits=logits,
        boxes=torch.full((2, 3, 4), 0.5),
        query_align=torch.zeros(2, 3, 4),
        token_align=torch.zeros(2, 4, 4),
        token_mask=None,
        logit_scale=torch.tensor(1.0),
    )
    targets = GroundingTargets((box, torch.zeros(0, 4)), (row, torch.zeros(0, 5)))
    ours = rec_losses(output, targets, 1.0, eos_coef=0.1)["loss_ce"]
    (matched,) = match_queries(output.logits, output.boxes, targets).queries.tolist()
    chances = -logits.log_softmax(-1)
    first = chances[0, matched, 0] + 0.1 * sum(chances[0, query, 4] for query in range(3) if query != matched)
    theirs = first + 0.1 * chances[1, :, 4].sum()
    torch.testing.assert_close(ours, first)
    assert float(theirs - ours) > 0.3


def noise_mode(backbone: Any, steps: int = 2) -> torch.Tensor:
    """Latents after a step in mode `noise`, with a correction too small to be seen."""
    text, null, told = backbone.encode_text(["a star"]), backbone.null_text(1), []
    latents = initial_noise(0, (4, 8, 8))[None]
    correction = CorrectionConfig(correct=1e-9, correction_mode="noise")
    score = lambda z, t, text: z.flatten(1).mean(1)  # noqa: E731
    sample(backbone, text, null, latents, SampleConfig(steps=steps, guidance_scale=1), correction, score, told.append)
    return told[0].latents


def ddim_step(backbone: Any, output: torch.Tensor, noise: bool) -> torch.Tensor:
    """From the first of two timesteps to the second, the output taken for the noise or for v."""
    first, second = make_scheduler(backbone, "ddim", 2).timesteps.tolist()
    alpha, below = (backbone.pipeline.scheduler.alphas_cumprod[t] for t in (first, second))
    z = initial_noise(0, (4, 8, 8))[None]
    if noise:
        clean = (z - (1 - alpha).sqrt() * output) / alpha.sqrt()
        return below.sqrt() * clean + (1 - below).sqrt() * output
    clean, direction = alpha.sqrt() * z - (1 - alpha).sqrt() * output, alpha.sqrt() * output + (1 - alpha).sqrt() * z
    return below.sqrt() * clean + (1 - below).sqrt() * direction


@torch.no_grad()
def predicted(backbone: Any, texts: TextStates) -> torch.Tensor:
    timestep = make_scheduler(backbone, "ddim", 2).timesteps[:1]
    return backbone.predict(initial_noise(0, (4, 8, 8))[None], timestep, texts)[0]


def test_what_a_base_predicts_is_followed_while_correcting() -> None:
    backbone = tiny_backbone("v_prediction")
    output = predicted(backbone, backbone.encode_text(["a star"]))
    ours = noise_mode(backbone)
    torch.testing.assert_close(ours, ddim_step(backbone, output, noise=False), rtol=1e-4, atol=1e-4)
    assert float((ours - ddim_step(backbone, output, noise=True)).abs().max()) > 0.1
    plain = tiny_backbone()
    output = predicted(plain, plain.encode_text(["a star"]))
    torch.testing.assert_close(noise_mode(plain), ddim_step(plain, output, noise=True), rtol=1e-4, atol=1e-4)


def test_guidance_below_one_is_none() -> None:
    backbone = tiny_backbone()
    text, null = backbone.encode_text(["a star"]), backbone.null_text(1)
    told: list[Step] = []
    settings = SampleConfig(steps=2, guidance_scale=0.5)
    sample(backbone, text, null, initial_noise(0, (4, 8, 8))[None], settings, CorrectionConfig(), None, told.append)
    conditional, empty = predicted(backbone, text), predicted(backbone, null)
    ours, theirs = (ddim_step(backbone, output, True) for output in (conditional, 0.5 * (empty + conditional)))
    torch.testing.assert_close(told[0].latents, ours, rtol=1e-4, atol=1e-4)
    assert float((ours - theirs).abs().max()) > 1e-3


def test_latents_are_decoded_by_the_vaes_own_scale() -> None:
    backbone = tiny_backbone()
    backbone.pipeline.vae.register_to_config(scaling_factor=0.13)
    latents = initial_noise(0, (4, 8, 8))[None]
    with torch.no_grad():
        ours, theirs = (backbone.pipeline.vae.decode(latents / scale).sample for scale in (0.13, 0.18215))
        torch.testing.assert_close(backbone.decode_image(latents), ours)
    assert float((ours - theirs).abs().max()) > 1e-2


def test_a_schedule_is_the_stock_pipelines(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps_offset": 0}))
    theirs = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    theirs.set_timesteps(4)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path).scheduler
    stock.set_timesteps(4)
    ours = make_scheduler(load_backbone(tmp_path, device="cpu"), "ddim", 4).timesteps.tolist()
    assert theirs.timesteps.tolist() == [750, 500, 250, 0]
    assert ours == stock.timesteps.tolist() == [751, 501, 251, 1]


def test_captions_are_tokenized_as_they_are() -> None:
    """`ftfy` would make the curly apostrophe a plain one: other tokens, and fewer of them."""
    backbone = tiny_backbone()
    curly, plain = (backbone.token_offsets([f"a man{mark}s hat"])[0] for mark in ("\u2019", "'"))
    ours, theirs = (sum(end > start for start, end in offsets) for offsets in (curly, plain))
    assert ours > theirs
    tokens = [backbone.pipeline.tokenizer(f"a man{mark}s hat").input_ids for mark in ("\u2019", "'")]
    assert len(tokens[0]) > len(tokens[1]) and ours == len(tokens[0]) - 2, "as the stock pipeline's tokenizer has it"
