"""Names and origins of the held-out figures; what a validation leaves behind."""

from dataclasses import replace

import pytest
import torch

from dpt_t2i.config import DenoiseConfig
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.evaluation.examples import HeldOut, examples_of
from dpt_t2i.evaluation.itm import ItmScores
from dpt_t2i.evaluation.rec import RecRanks
from dpt_t2i.sampling.noise import shared_noise
from dpt_t2i.training import validation
from dpt_t2i.training.validation import Validation
from tests.tiny import tiny_adapter, tiny_backbone


@pytest.fixture(scope="module")
def model():
    backbone = tiny_backbone()
    return backbone, tiny_adapter(backbone, "up1"), backbone.parse_taps("up1")


@pytest.fixture(scope="module")
def records():
    return SceneRecords("val", 3, 32)[:]


def test_figures_of_full_records_are_shares_of_the_examples(model, records):
    figures = Validation(*model, records, 32)()
    assert list(figures) == ["itm_text", "itm_image", "rec_p1", "rec_p5", "rec_p10"]
    assert all(value * 3 == pytest.approx(round(value * 3)) for value in figures.values())
    assert figures["rec_p1"] <= figures["rec_p5"] <= figures["rec_p10"]
    assert Validation(*model, records, 32)() == figures, "the same noise every time"


def test_figures_without_a_source_are_left_out(model, records):
    texts = [replace(record, negative_image=None, expressions=()) for record in records]
    assert list(Validation(*model, texts, 32)()) == ["itm_text"]
    boxes = [replace(record, negative_image=None, negatives=(), captions=("no rule knows this",)) for record in records]
    assert list(Validation(*model, boxes, 32)()) == ["rec_p1", "rec_p5", "rec_p10"]


def test_without_negatives_captions_by_rule_are_what_matching_is_measured_by(model, records):
    texts = [replace(record, negative_image=None, negatives=(), expressions=()) for record in records]
    assert list(Validation(*model, texts, 32)()) == ["itm_text"]


def test_what_is_cut_is_not_told_again(model, records, caplog):
    backbone, *rest = model
    long = [replace(record, captions=("a red circle " * 40,)) for record in records]
    Validation(backbone, *rest, long, 32)()
    assert not caplog.records
    backbone.encode_text(list(long[0].captions))
    assert len(caplog.records) == 1, "which is told elsewhere"


@pytest.mark.parametrize("training", [True, False])
def test_figures_by_hand_and_the_denoisers_mode(model, records, monkeypatch, training):
    backbone, adapter, taps = model
    seen = []

    def scores(scorer, examples, timesteps, batch_size, first, on_truncate):
        assert (batch_size, first, on_truncate) == (16, 0, "ignore")
        seen.append((len(list(examples)), list(timesteps), backbone.denoiser.training, adapter.training))
        pairs = [(0.1, 0.4), (0.1, 0.3), (0.3, 0.2)]  # (wrong text, wrong image) beside 0.25 for the true pair
        return [ItmScores(str(i), "r", 500, 0.25, text, image) for i, (text, image) in enumerate(pairs)]

    def ranks(scorer, examples, timesteps, batch_size, first, on_truncate):
        assert (batch_size, first, on_truncate) == (16, 0, "ignore")
        seen.append((len(list(examples)), list(timesteps), backbone.denoiser.training, adapter.training))
        return [RecRanks(str(i), 500, rank, None) for i, rank in enumerate([0, 4, 9, 10, None])]

    monkeypatch.setattr(validation, "itm_scores", scores)
    monkeypatch.setattr(validation, "rec_ranks", ranks)
    backbone.denoiser.train(training)
    adapter.train()
    try:
        figures = Validation(backbone, adapter, taps, records[:2] + records[:1], 32)()
        assert backbone.denoiser.training is training
    finally:
        backbone.denoiser.eval()
        adapter.eval()
    # Text side: 0.25 beats 0.1, 0.1, not 0.3. Image side: only 0.2. Ranks count from 0.
    assert figures == pytest.approx(
        {"itm_text": 2 / 3, "itm_image": 1 / 3, "rec_p1": 0.2, "rec_p5": 0.4, "rec_p10": 0.6}
    )
    assert seen == [(3, [500], False, False)] * 2, "without dropout, at the paper's timestep"


def test_pictures_are_opened_when_their_turn_comes(model, records):
    opened = []
    watched = [replace(r, image=lambda r=r: opened.append(r.id) or r.load_image()) for r in records]
    validate = Validation(*model, watched, 32, batch_size=1)
    assert opened == [], "none is held in memory"
    stream = iter(validate.examples)
    next(stream)
    assert opened == [records[0].id]
    assert validate() == Validation(*model, records, 32, batch_size=3)(), "the batch size changes no figure"


def test_the_denoising_loss_by_hand(model, records):
    """Five timesteps, one noise an example, full captions, the mean over all of it."""
    backbone, _, _ = model
    losses = []
    for number, example in enumerate(examples_of(records, 32)):
        clean = backbone.encode_image(example.pixels[None])
        noise = shared_noise(0, number, clean.shape[1:])[None]
        for t in (100, 300, 500, 700, 900):
            alpha = backbone.pipeline.scheduler.alphas_cumprod[t]
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            with torch.no_grad():
                states = backbone.encode_text([example.caption]).tokens
                predicted = backbone.denoiser(noisy, t, encoder_hidden_states=states).sample
            losses.append(float((predicted - noise).square().mean()))
    assert len(losses) == 15
    found = Validation(*model, records, 32, batch_size=2).denoising(DenoiseConfig())
    assert found == pytest.approx({"loss_mse": sum(losses) / 15}, rel=1e-5)


def test_the_denoising_loss_is_the_trainings_own(model, records):
    validate = Validation(*model, records, 32)
    weighted = validate.denoising(DenoiseConfig(snr_gamma=1.0))["loss_mse"]
    assert weighted < validate.denoising(DenoiseConfig())["loss_mse"], "min-SNR weights are at most 1"


def test_the_denoising_loss_leaves_the_mode_as_it_was(model, records):
    backbone = model[0]
    backbone.denoiser.train()
    try:
        Validation(*model, records, 32).denoising(DenoiseConfig())
        assert backbone.denoiser.training
    finally:
        backbone.denoiser.eval()


def test_parts_have_the_numbers_that_the_whole_gives(records):
    bare = [replace(records[0], expressions=()), *records[1:]]
    part = HeldOut(bare, 32, range(2, 3))
    assert [example.id for example in part] == [f"scenes/{records[2].id}"]
    assert (part.first, part.first_grounded) == (2, 1), "the first record has nothing to ground"
