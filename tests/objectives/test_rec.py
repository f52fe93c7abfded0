"""The grounding losses, worked out by hand for one box."""

import math
from dataclasses import replace

import pytest
import torch

from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.objectives.rec import rec_losses
from dpt_t2i.objectives.types import GroundingTargets, Losses

K = 3  # token classes; class K is "no object"


def example_output(batch: int = 1) -> AdapterOutput:
    """Two queries, uniform over classes; query 0 on the box [0.5, 0.5, 0.2, 0.2], and along token 1."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
    query_align = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    token_align = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    return AdapterOutput(
        match_embeds=torch.empty(0),
        logits=torch.zeros(batch, 2, K + 1),
        boxes=boxes.expand(batch, -1, -1),
        query_align=query_align.expand(batch, -1, -1),
        token_align=token_align.expand(batch, -1, -1),
        logit_scale=torch.ones([]),
    )


def one_box(
    box: tuple[float, ...] = (0.5, 0.5, 0.2, 0.4), row: tuple[float, ...] = (0.0, 1.0, 0.0, 0.0)
) -> GroundingTargets:
    return GroundingTargets((torch.tensor([box]),), (torch.tensor([row]),))


NO_BOX = GroundingTargets((torch.zeros(0, 4),), (torch.zeros(0, K + 1),))


def test_one_box_by_hand() -> None:
    losses = rec_losses(example_output(), one_box(), num_boxes=1, eos_coef=0.1, temperature=1.0)
    assert losses["loss_ce"].item() == pytest.approx(1.1 * math.log(4))  # matched: 1, the other query: 0.1
    assert losses["loss_bbox"].item() == pytest.approx(0.2)
    assert losses["loss_giou"].item() == pytest.approx(0.5)
    # Query 0 against tokens (0, 1), token 1 against queries (1, 0): log(1 + e) - 1 both ways.
    assert losses["loss_align"].item() == pytest.approx(math.log(1 + math.e) - 1)


def test_soft_rows_share_one_vote() -> None:
    """Rows that sum to 1 weigh a long expression no more than a short one."""
    for row in ((0.0, 1.0, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3, 0.0)):
        losses = rec_losses(example_output(), one_box(row=row), num_boxes=1)
        assert losses["loss_ce"].item() == pytest.approx(1.1 * math.log(4))


def test_sums_are_divided_by_the_given_number_of_boxes() -> None:
    one, four = (rec_losses(example_output(), one_box(), num_boxes=n) for n in (1, 4))
    assert {k: v.item() for k, v in four.items()} == pytest.approx({k: v.item() / 4 for k, v in one.items()})
    none = rec_losses(example_output(), one_box(), num_boxes=0)
    assert none["loss_ce"].item() == one["loss_ce"].item()


def test_an_example_without_boxes_is_masked() -> None:
    alone = rec_losses(example_output(), one_box(), num_boxes=1)
    pair = GroundingTargets(one_box().boxes + NO_BOX.boxes, one_box().positive_map + NO_BOX.positive_map)
    beside = rec_losses(example_output(batch=2), pair, num_boxes=1)
    assert {k: v.item() for k, v in beside.items()} == pytest.approx({k: v.item() for k, v in alone.items()})


def test_a_batch_without_boxes_is_zero_and_differentiable() -> None:
    output = replace(example_output(), logits=torch.zeros(1, 2, K + 1, requires_grad=True))
    losses = rec_losses(output, NO_BOX, num_boxes=0)
    assert [value.item() for value in losses.values()] == [0.0] * 4
    losses["loss_ce"].backward()
    assert output.logits.grad is not None and output.logits.grad.abs().max() == 0


def test_padding_tokens_are_no_negatives() -> None:
    """With the mask, a text padded to 5 tokens has the loss of the bare text; without it, padding counts."""
    bare = example_output()
    assert bare.token_align is not None
    padding = torch.tensor([[[1.0, 0.0]]]).expand(1, 3, 2)
    padded = replace(bare, token_align=torch.cat((bare.token_align, padding), dim=1))
    masked = replace(padded, token_mask=torch.tensor([[True, True, False, False, False]]))
    plain, with_mask, without = (rec_losses(one, one_box(), 1)["loss_align"].item() for one in (bare, masked, padded))
    assert with_mask == pytest.approx(plain)
    assert without > plain + 0.5


def test_losses_are_float32_also_under_autocast() -> None:
    torch.manual_seed(0)
    output = replace(example_output(), logits=torch.randn(1, 2, K + 1), query_align=torch.randn(1, 2, 2))
    expected = rec_losses(output, one_box(), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = rec_losses(output, one_box(), 1)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        assert actual[name].item() == value.item()


def test_the_matched_query_is_pulled_to_the_box() -> None:
    boxes = example_output().boxes.clone().requires_grad_(True)
    losses = rec_losses(replace(example_output(), boxes=boxes), one_box(), 1)
    (losses["loss_bbox"] + losses["loss_giou"]).backward()
    assert boxes.grad is not None
    assert boxes.grad[0, 0, 3] < 0  # the predicted box is too low: a step down the gradient makes it taller
    assert boxes.grad[0, 1].abs().max() == 0


def test_text_states_are_required() -> None:
    with pytest.raises(ValueError, match="text_tokens"):
        rec_losses(replace(example_output(), token_align=None), one_box(), 1)


def test_total_is_the_weighted_sum() -> None:
    losses = Losses(
        {"loss_ce": torch.tensor(2.0), "loss_bbox": torch.tensor(0.5)},
        {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_mse": 1.0},
    )
    assert losses.total.item() == 4.5
    assert one_box().num_boxes() == 1 and NO_BOX.num_boxes() == 0
