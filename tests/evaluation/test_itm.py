"""Matching accuracy: which candidate wins, ties, NaN, batch size, summaries counted by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpt_t2i.adapter.score import match_score
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.examples import EvalExample, examples_of
from dpt_t2i.evaluation.itm import ItmScores, itm_scores, itm_summary
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.sampling.noise import shared_noise
from dpt_t2i.sampling.scoring import MatchScorer
from tests.tiny import read_apart


@pytest.fixture(scope="module")
def examples() -> list[EvalExample]:
    found = [example for example in examples_of(SceneRecords("val", 12, 32), 32) if example.hard_caption]
    told = read_apart([e.caption for e in found], [str(e.hard_caption) for e in found])
    return [example for example, apart in zip(found, told, strict=True) if apart][:6]


def test_a_hard_caption_that_reads_as_the_caption_is_not_asked(model: T2IModel, examples: list[EvalExample]) -> None:
    """The encoder reads 16 tokens, and takes capitals for small letters."""
    assert model.scorer is not None
    far = "red blue " * 10
    alike = [
        replace(examples[0], caption=f"{far} star", hard_caption=f"{far} square"),
        replace(examples[1], hard_caption=examples[1].caption.upper()),
        examples[2],
    ]
    rows = itm_scores(model.scorer, alike, (500,))
    assert [(row.wrong_text is None, row.unseen) for row in rows] == [(True, True), (True, True), (False, False)]
    assert all(row.wrong_image is not None for row in rows)
    summary = itm_summary(rows)["500"]
    assert (summary["text"]["count"], summary["image"]["count"], summary["unseen"]) == (1, 3, 2)
    assert "unseen" not in itm_summary(rows[2:])["500"]


def test_the_scores_are_those_of_one_pair_at_a_time(model: T2IModel, examples: list[EvalExample]) -> None:
    assert model.scorer is not None
    rows = itm_scores(model.scorer, examples, (400,), seed=9, batch_size=4)
    backbone, scorer = model.backbone, model.scorer
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        assert example.hard_caption is not None and example.hard_pixels is not None
        pairs = [(example.pixels, example.caption), (example.pixels, example.hard_caption)]
        pairs.append((example.hard_pixels, example.caption))
        found = []
        for pixels, caption in pairs:
            with torch.no_grad():
                latents = backbone.encode_image(pixels[None])
                step = torch.tensor([400])
                noisy = backbone.add_noise(latents, shared_noise(9, index, latents.shape[1:])[None], step)
                text = backbone.encode_text([caption])
                found.append(float(match_score(scorer.read(noisy, step, text), text.pooled)))
        assert [row.positive, row.wrong_text, row.wrong_image] == pytest.approx(found, abs=1e-4)
        assert (row.id, row.timestep) == (example.id, 400)


def test_the_batch_size_changes_no_score(model: T2IModel, examples: list[EvalExample]) -> None:
    assert model.scorer is not None
    one, many = (itm_scores(model.scorer, examples, (500, 250), batch_size=b) for b in (1, 6))
    key = lambda row: (row.id, row.timestep)  # noqa: E731
    for a, b in zip(sorted(one, key=key), sorted(many, key=key), strict=True):
        assert key(a) == key(b)
        assert a.positive == pytest.approx(b.positive, abs=1e-4)
        assert a.wrong_text == pytest.approx(b.wrong_text, abs=1e-4)
        assert a.wrong_image == pytest.approx(b.wrong_image, abs=1e-4)


class Constant(MatchScorer):
    """Gives every pair the same score."""

    def __init__(self, model: T2IModel, value: float) -> None:
        assert model.scorer is not None and model.adapter is not None
        super().__init__(model.backbone, model.adapter, model.scorer.taps)
        self.value = value

    def __call__(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        return torch.full((len(noisy),), self.value)


def test_a_tie_is_never_right(model: T2IModel, examples: list[EvalExample]) -> None:
    summary = itm_summary(itm_scores(Constant(model, 0.5), examples, (500,)))["500"]
    assert summary["text"]["accuracy"] == summary["image"]["accuracy"] == summary["both"]["accuracy"] == 0.0
    assert summary["text"]["count"] == 6


def test_nan_names_the_example(model: T2IModel, examples: list[EvalExample]) -> None:
    with pytest.raises(InputError, match=r"scenes/val-0-000001.*timestep 500.*NaN"):
        itm_scores(Constant(model, float("nan")), examples, (500,))


def test_what_has_no_negative_is_not_counted(model: T2IModel, examples: list[EvalExample]) -> None:
    assert model.scorer is not None
    bare = [
        replace(examples[0], hard_caption=None),
        replace(examples[1], hard_pixels=None),
        replace(examples[2], hard_caption=None, hard_pixels=None),
    ]
    rows = itm_scores(model.scorer, bare, (500,))
    assert [row.text_right is None for row in rows] == [True, False, True]
    assert [row.image_right is None for row in rows] == [False, True, True]
    alone = itm_scores(model.scorer, [examples[1]], (500,), seed=0)
    assert rows[1].wrong_text is not None and alone[0].wrong_text is not None
    summary = itm_summary(rows)["500"]
    assert summary["text"]["count"] == summary["image"]["count"] == 1 and "both" not in summary


def test_the_summary_by_hand() -> None:
    rows = [
        ItmScores("a", "swap", 500, 0.9, 0.1, 0.2),  # text and image right
        ItmScores("b", "swap", 500, 0.5, 0.6, 0.2),  # image only
        ItmScores("c", "count", 500, 0.5, 0.4, 0.5),  # text only: the other is a tie
        ItmScores("a", "swap", 100, 0.1, 0.9, 0.9),
    ]
    summary = itm_summary(rows)
    assert list(summary) == ["500", "100"]
    assert summary["500"]["text"]["accuracy"] == pytest.approx(2 / 3)
    assert summary["500"]["image"]["accuracy"] == pytest.approx(2 / 3)
    assert summary["500"]["both"]["accuracy"] == pytest.approx(1 / 3)
    assert summary["500"]["rules"]["swap"]["accuracy"] == 0.5 and summary["500"]["rules"]["count"]["accuracy"] == 1.0
    assert summary["100"]["text"]["accuracy"] == 0.0
