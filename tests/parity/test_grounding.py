"""Grounding after the heads: boxes, their ranking and Precision@k; token ids of both tokenizers."""

import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from dpt_t2i.adapter.postprocess import grounding_scores, rank_boxes
from dpt_t2i.adapter.types import AdapterOutput
from dpt_t2i.backbones import text as clip_text
from dpt_t2i.backbones.types import TextStates
from dpt_t2i.boxes import xyxy_to_cxcywh
from dpt_t2i.evaluation.examples import EvalExample
from dpt_t2i.evaluation.rec import RecRanks, rec_ranks, rec_summary
from dpt_t2i.sampling.scoring import MatchScorer
from tests.parity.golden import SHARED, adapter, backbone, model, needs_shared, numbers, tensors

pytestmark = needs_shared


def output_of(logits: Tensor, boxes: Tensor) -> AdapterOutput:
    return AdapterOutput(torch.empty(0), logits, boxes, torch.empty(0), None, torch.ones([]))


def test_boxes_scores_and_ranking_of_every_example() -> None:
    golden = tensors("rec_postprocess")
    sizes = [(width, height) for height, width in golden["target_sizes_hw"].tolist()]
    ranked = rank_boxes(output_of(golden["pred_logits"], golden["pred_boxes"]), sizes)
    torch.testing.assert_close(grounding_scores(golden["pred_logits"]), golden["scores"])
    assert [one.queries.tolist() for one in ranked] == numbers("rec_postprocess")["ranking"]
    for example, one in enumerate(ranked):
        torch.testing.assert_close(one.boxes, golden["boxes_xyxy_abs"][example, one.queries])
        torch.testing.assert_close(one.scores, golden["scores"][example, one.queries])
    tie = numbers("rec_postprocess")["tie"]
    places = [ranked[tie["sample"]].queries.tolist().index(query) for query in tie["queries"]]
    assert places == tie["rank_of_5_11"]


class Told(MatchScorer):
    """Answers with the golden predictions, example by example, as logits of one class beside `no object`."""

    def __init__(self, answers: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(backbone(lora=False), adapter(), model().parse_taps("up1"))
        self.answers = answers

    def read(self, noisy: Tensor, timesteps: Tensor, text: TextStates) -> AdapterOutput:
        scores, boxes = (torch.stack(column) for column in zip(*self.answers, strict=True))
        return output_of(torch.stack([scores.log(), (1 - scores).log()], dim=-1), boxes)


def ranks() -> dict[str, list[RecRanks]]:
    """By data set: the goldens' twelve expressions through our own evaluation."""
    told = numbers("rec_postprocess")
    images = told["refexp.coco_gt"]["images"]
    truth = {a["image_id"]: a["bbox"] for a in told["refexp.coco_gt"]["annotations"]}
    answers, examples = [], []
    for image in images:
        extent = torch.tensor([image["width"], image["height"]] * 2, dtype=torch.float64)
        guess = told["refexp.predictions"][str(image["id"])]
        boxes = torch.tensor(guess["boxes"], dtype=torch.float64) / extent
        answers.append((torch.tensor(guess["scores"], dtype=torch.float64), xyxy_to_cxcywh(boxes)))
        left, top, width, height = truth[image["id"]]
        target = xyxy_to_cxcywh(torch.tensor([[left, top, left + width, top + height]]) / extent)
        examples.append(EvalExample(str(image["id"]), torch.zeros(3, 32, 32), "x", expression="x", boxes=target))
    rows = {row.id: row for row in rec_ranks(Told(answers), examples, (500,))}
    sets = dict.fromkeys(image["dataset_name"] for image in images)
    return {name: [rows[str(i["id"])] for i in images if i["dataset_name"] == name] for name in sets}


def test_differs_precision_is_by_iou_and_the_releases_metric_stands_beside_it() -> None:
    told = numbers("rec_postprocess")
    by_giou, by_iou = told["refexp.precision@1,5,10"], told["refexp.same_with_plain_iou(not the release)"]
    assert by_giou != by_iou
    for name, rows in ranks().items():
        summary = rec_summary(rows)["500"]
        assert [summary[f"giou_precision@{k}"]["accuracy"] for k in (1, 5, 10)] == pytest.approx(by_giou[name])
        assert [summary[f"precision@{k}"]["accuracy"] for k in (1, 5, 10)] == pytest.approx(by_iou[name])


def tokenization() -> dict[str, dict[str, list[int] | dict[str, list[int] | list[list[int]]]]]:
    found = json.loads((SHARED / "tokenization.json").read_text(encoding="utf-8"))
    return dict(found)


def test_clip_tokens() -> None:
    for text, ids in tokenization()["clip"].items():
        assert clip_text.tokenize(model().pipeline.tokenizer, [text], 77, "error").ids[0].tolist() == ids, text


def test_roberta_tokens_and_the_characters_that_they_cover() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "roberta")
    for text, wanted in tokenization()["roberta"].items():
        assert isinstance(wanted, dict)
        ours = tokenizer(text, return_offsets_mapping=True)
        assert ours["input_ids"] == wanted["input_ids"], text
        assert [list(offset) for offset in ours["offset_mapping"]] == wanted["offsets"], text
