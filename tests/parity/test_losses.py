"""The losses against the authors' release (its ITM class with `.half()` made a no-op)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpt_t2i.adapter.score import match_score
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.objectives.denoise import denoise_loss
from dpt_t2i.objectives.itm import itm_loss
from dpt_t2i.objectives.matcher import match_queries
from dpt_t2i.objectives.positions import positive_map
from dpt_t2i.objectives.rec import rec_losses
from dpt_t2i.objectives.types import GroundingTargets

GOLDEN = load_file(Path(__file__).parent / "losses.safetensors")
BOXES_PER_EXAMPLE = [1, 1, 2, 1]


def output_of(name: str) -> AdapterOutput:
    return AdapterOutput(
        match_embeds=torch.empty(0),
        logits=GOLDEN[f"{name}.pred_logits"],
        boxes=GOLDEN[f"{name}.pred_boxes"],
        query_align=GOLDEN[f"{name}.proj_queries"],
        token_align=GOLDEN[f"{name}.proj_tokens"],
        logit_scale=torch.ones([]),
    )


def batch_targets(rows: Tensor | None = None) -> GroundingTargets:
    rows = GOLDEN["batch.positive_map"] if rows is None else rows
    return GroundingTargets(
        boxes=GOLDEN["batch.boxes"].split(BOXES_PER_EXAMPLE), positive_map=rows.split(BOXES_PER_EXAMPLE)
    )


@pytest.mark.parametrize(
    ("name", "losses", "queries", "targets"),
    [
        (
            "direct.criterion",
            {"loss_ce": 35.074867, "loss_bbox": 0.3206390, "loss_giou": 0.6461169, "loss_align": 9.0946255},
            [14, 19, 6, 16, 18],
            [0, 1, 2, 3, 4],
        ),
        (
            "stage2.rec",
            {"loss_ce": 32.326191, "loss_bbox": 0.4424807, "loss_giou": 0.7627803, "loss_align": 6.7130661},
            [17, 7, 0, 6, 13],
            [0, 1, 3, 2, 4],
        ),
    ],
)
def test_grounding_losses_and_matching(
    name: str, losses: dict[str, float], queries: list[int], targets: list[int]
) -> None:
    output = output_of(name)
    matching = match_queries(output.logits, output.boxes, batch_targets())
    assert matching.examples.tolist() == [0, 1, 2, 2, 3]
    assert matching.queries.tolist() == queries
    assert matching.targets.tolist() == targets
    ours = {key: value.item() for key, value in rec_losses(output, batch_targets(), num_boxes=5).items()}
    assert ours == pytest.approx(losses, rel=1e-4)


def test_a_span_that_begins_on_a_space_is_placed_in_its_own_text() -> None:
    """Span [14, 20) is " under"; the release looked character 15 up in another text, and gave 7.362 instead."""
    caption = "the blue chair under the table"
    offsets = [(0, 0), (0, 3), (4, 8), (9, 14), (15, 16), (16, 18), (18, 20), (21, 24), (25, 30), (0, 0)]
    assert caption[15:20] == "under"
    rows = (positive_map(offsets, [[(14, 20)]]) > 0).float()
    targets = batch_targets(torch.cat((GOLDEN["batch.positive_map"][:4], rows)))
    losses = rec_losses(output_of("direct.criterion"), targets, num_boxes=5)
    assert losses["loss_align"].item() == pytest.approx(7.7974916, rel=1e-4)


@pytest.mark.parametrize(("scale", "i2t", "t2i"), [(1.0, 1.0948069, 1.0904549), (20.0, 1.3325558, 1.0830166)])
def test_matching_losses(scale: float, i2t: float, t2i: float) -> None:
    texts = GOLDEN["direct.itm.all_txt"]  # [4, 3, P]: caption, hard negative, random
    scores_i2t = scores(GOLDEN["direct.itm.img_cond_different_txt"], texts)
    scores_t2i = scores(GOLDEN["direct.itm.different_img_cond_same_txt"], texts[:, :1].expand(-1, 3, -1))
    losses = itm_loss(scores_i2t, scores_t2i, torch.tensor(scale))
    assert losses["loss_i2t"].item() == pytest.approx(i2t, rel=1e-4)
    assert losses["loss_t2i"].item() == pytest.approx(t2i, rel=1e-4)


def scores(match_embeds: Tensor, pooled: Tensor) -> Tensor:
    """`[B, 3, Q, P]` and `[B, 3, P]` -> `[B, 3]` through the one score."""
    output = AdapterOutput(match_embeds.flatten(0, 1), *[torch.empty(0)] * 3, None, torch.ones([]))
    return match_score(output, pooled.flatten(0, 1)).unflatten(0, (-1, 3))


@pytest.mark.parametrize(("gamma", "expected"), [(None, 2.0882826), (5.0, 1.5359004)])
def test_denoising_loss(gamma: float | None, expected: float) -> None:
    snr = torch.tensor([1175.44055, 2.06553173, 0.19158617, 0.00468191])
    loss = denoise_loss(GOLDEN["direct.mse.model_pred"], GOLDEN["direct.mse.target"], snr=snr, snr_gamma=gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
