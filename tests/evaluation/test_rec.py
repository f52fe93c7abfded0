"""Grounding precision: ranks by hand, the oracle on pictures whose answer is known, NaN, batch size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.data.scenes import SceneRecords
from dpt_t2i.errors import InputError
from dpt_t2i.evaluation.examples import EvalExample, examples_of
from dpt_t2i.evaluation.rec import RecRanks, core_color, match_color, rec_oracle, rec_ranks, rec_summary
from dpt_t2i.sampling.model import T2IModel
from dpt_t2i.sampling.scoring import MatchScorer


class Fixed(MatchScorer):
    """Gives every image the same boxes, the first the best."""

    def __init__(self, model: T2IModel, boxes: list[list[float]], worst: float = 0.0) -> None:
        assert model.scorer is not None and model.adapter is not None
        super().__init__(model.backbone, model.adapter, model.scorer.taps)
        self.boxes, self.worst = torch.tensor(boxes), worst

    def read(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> AdapterOutput:
        rows, queries = len(noisy), len(self.boxes)
        logits = torch.zeros(rows, queries, 3)
        logits[..., -1] = torch.arange(queries) + self.worst  # "no object" grows down the list
        nothing = torch.zeros(rows, queries, 1)
        return AdapterOutput(nothing, logits, self.boxes.expand(rows, -1, -1), nothing, None, torch.tensor(1.0))


def example(identity: str, *boxes: list[float]) -> EvalExample:
    return EvalExample(identity, torch.zeros(3, 32, 32), "a", expression="the star", boxes=torch.tensor(boxes))


def test_the_rank_of_the_first_right_box(model: T2IModel) -> None:
    target = [0.5, 0.5, 0.4, 0.4]
    # Shifted by a quarter of its side: IoU 0.75 / 1.25 = 0.6, hull 1.25, so GIoU = 0.6 too.
    # Shifted diagonally by 0.18 of it: IoU = 0.6724 / 1.3276 = 0.506; hull 1.3924, GIoU = 0.506 - 0.0465 = 0.460.
    diagonal = [0.5 + 0.072, 0.5 + 0.072, 0.4, 0.4]
    scorer = Fixed(model, [[0.1, 0.1, 0.1, 0.1], diagonal, [0.6, 0.5, 0.4, 0.4], target])
    examples = [example("x", target), example("nowhere", [0.9, 0.9, 0.05, 0.05])]
    rows = rec_ranks(scorer, examples, (500, 100))
    assert [(row.id, row.timestep) for row in rows] == [("x", 500), ("nowhere", 500), ("x", 100), ("nowhere", 100)]
    assert (rows[0].iou_rank, rows[0].giou_rank) == (1, 2)
    assert (rows[1].iou_rank, rows[1].giou_rank) == (None, None)
    either = rec_ranks(scorer, [example("two", [0.9, 0.9, 0.05, 0.05], [0.1, 0.1, 0.1, 0.1])], (500,))
    assert either[0].iou_rank == 0  # of several named things any one will do


def test_precision_by_hand() -> None:
    ranks = [0, 1, 5, 10, None]  # a rank of k is just outside Precision@k
    rows = [RecRanks(str(i), 500, rank, None if rank == 0 else rank) for i, rank in enumerate(ranks)]
    summary = rec_summary(rows)["500"]
    assert [summary[f"precision@{k}"]["accuracy"] for k in (1, 5, 10)] == [0.2, 0.4, 0.6]
    assert [summary[f"giou_precision@{k}"]["accuracy"] for k in (1, 5, 10)] == [0.0, 0.2, 0.4]
    assert summary["precision@1"]["count"] == 5


def test_examples_without_expression_are_left_out(model: T2IModel) -> None:
    bare = replace(example("bare", [0.5, 0.5, 0.4, 0.4]), expression=None)
    assert rec_ranks(Fixed(model, [[0.5] * 4]), [bare], (500,)) == []


def test_nan_names_the_example(model: T2IModel) -> None:
    scorer = Fixed(model, [[0.5, 0.5, float("nan"), 0.4]])
    with pytest.raises(InputError, match="`x` at timestep 500 is NaN"):
        rec_ranks(scorer, [example("x", [0.5, 0.5, 0.4, 0.4])], (500,))


def test_the_batch_size_changes_no_rank(model: T2IModel) -> None:
    assert model.scorer is not None
    examples = list(examples_of(SceneRecords("val", 7, 32), 32))
    one, many = (rec_ranks(model.scorer, examples, (300,), batch_size=size) for size in (1, 7))
    assert [replace(row, best_giou=None) for row in one] == [replace(row, best_giou=None) for row in many]
    assert [row.best_giou for row in one] == pytest.approx([row.best_giou for row in many], abs=1e-5)


def picture() -> tuple[Tensor, Tensor]:
    """Grey, a red block at x 8..16, y 20..28, and a blue one of the same size; the red one's box."""
    pixels = torch.zeros(3, 32, 32)
    pixels[:, 20:28, 8:16] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    pixels[:, 4:12, 20:28] = torch.tensor([-1.0, -1.0, 1.0])[:, None, None]
    return pixels, torch.tensor([12 / 32, 24 / 32, 8 / 32, 8 / 32])


def test_the_matched_filter_finds_the_block_of_the_colour() -> None:
    pixels, box = picture()
    color = core_color(pixels, box)
    assert color.tolist() == [1.0, -1.0, -1.0]
    assert (match_color(pixels, color, box[2:]) * 32).tolist() == [8, 20, 16, 28]
    noisy = pixels + 0.8 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (match_color(noisy, color, box[2:]) * 32 - torch.tensor([8, 20, 16, 28])).abs().max() <= 1
    blue = core_color(pixels, torch.tensor([24 / 32, 8 / 32, 8 / 32, 8 / 32]))
    assert (match_color(pixels, blue, box[2:]) * 32).tolist() == [20, 4, 28, 12]


def test_a_tiny_box_still_has_a_colour_and_a_place() -> None:
    pixels, _ = picture()
    assert core_color(pixels, torch.tensor([0.99, 0.99, 0.01, 0.01])).isfinite().all()
    assert match_color(pixels, torch.zeros(3), torch.tensor([0.001, 0.001])).isfinite().all()


class Transparent:
    """A backbone whose latents are the pixels, with signal 0.5 at every timestep: the oracle alone is judged."""

    device = torch.device("cpu")

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode_image(self, latents: Tensor) -> Tensor:
        return latents

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return 0.5 * latents + 0.001 * timesteps[0] * noise


def test_the_oracle_sees_through_little_noise_only() -> None:
    pixels, box = picture()
    pixels[:, 20:28, 8:16] *= 0.5
    pixels[:, 4:12, 20:28] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]  # looks like it before the signal is undone
    examples = [EvalExample(str(i), pixels, "a", expression="the red block", boxes=box[None]) for i in range(12)]
    rows = rec_oracle(Transparent(), examples, (50, 5000), batch_size=5)  # type: ignore[arg-type]
    summary = rec_summary(rows, at=(1,))
    assert summary["50"]["precision@1"]["accuracy"] == 1.0  # noise of 0.1 after undoing the signal
    assert summary["5000"]["precision@1"]["accuracy"] < 0.5  # noise of 10
    several = [replace(examples[0], boxes=torch.stack([box, box]))]
    assert rec_oracle(Transparent(), several, (50,)) == []  # type: ignore[arg-type]
