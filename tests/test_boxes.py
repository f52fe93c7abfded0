"""Box algebra: known boxes, degenerate boxes, and the same functions of transformers as an oracle."""

import pytest
import torch
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou

from dpt_t2i import boxes

UNIT = torch.tensor([[0.0, 0.0, 2.0, 2.0]])


def random_xyxy(count: int, seed: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    return corners.flatten(1)


def test_each_convention_of_one_box() -> None:
    xyxy, cxcywh = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2.5, 5, 3, 6])
    assert boxes.cxcywh_to_xyxy(cxcywh).tolist() == xyxy.tolist()
    assert boxes.xyxy_to_cxcywh(xyxy).tolist() == cxcywh.tolist()


@pytest.mark.parametrize(
    ("other", "iou", "giou"),
    [
        ([0, 0, 2, 2], 1.0, 1.0),  # itself
        ([1, 0, 3, 2], 2 / 6, 2 / 6),  # half over; the hull is filled
        ([1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),  # a corner over; 2 of the hull's 9 are empty
        ([2, 0, 4, 2], 0.0, 0.0),  # touching
        ([4, 0, 6, 2], 0.0, -4 / 12),  # a gap of 4 in a hull of 12
        ([1, 1, 1, 1], 0.0, 0.0),  # a point inside
        ([4, 4, 4, 4], 0.0, -(16 - 4) / 16),  # a point outside
        ([2, 2, 0, 0], 0.0, -1 + 4 / 4),  # swapped corners: nothing
    ],
)
def test_overlap_of_known_boxes(other: list[float], iou: float, giou: float) -> None:
    second = torch.tensor([other], dtype=torch.float32)
    assert boxes.iou_xyxy(UNIT, second).item() == pytest.approx(iou)
    assert boxes.giou_xyxy(UNIT, second).item() == pytest.approx(giou)


def test_two_empty_boxes_give_zero_and_a_finite_gradient() -> None:
    first = torch.tensor([[1.0, 1.0, 1.0, 3.0]], requires_grad=True)  # a line
    boxes.giou_xyxy(first, torch.tensor([[1.0, 0.0, 1.0, 4.0]])).sum().backward()
    assert boxes.giou_xyxy(first, torch.tensor([[1.0, 0.0, 1.0, 4.0]])).item() == 0.0
    assert first.grad is not None and first.grad.tolist() == [[0.0] * 4]


def test_pairwise_against_transformers() -> None:
    first, second = random_xyxy(7, seed=1), random_xyxy(5, seed=2)
    torch.testing.assert_close(boxes.iou_xyxy(first, second), box_iou(first, second)[0])
    torch.testing.assert_close(boxes.giou_xyxy(first, second), generalized_box_iou(first, second))
    torch.testing.assert_close(
        boxes.giou_xyxy_elementwise(first[:5], second), generalized_box_iou(first, second).diagonal()
    )
    torch.testing.assert_close(boxes.cxcywh_to_xyxy(first), center_to_corners_format(first))


def test_half_precision_pixels_keep_their_area() -> None:
    pixels = torch.tensor([[0.0, 0.0, 512.0, 512.0]], dtype=torch.float16)  # 262144 overflows float16
    assert boxes.area_xyxy(pixels).item() == 512.0 * 512.0
    assert boxes.iou_xyxy(pixels, pixels).item() == 1.0


def test_clip_moves_corners_into_the_image() -> None:
    clipped = boxes.clip_xyxy(torch.tensor([[-3.0, 2.0, 12.0, 30.0], [11.0, 2.0, 14.0, 4.0]]), width=10, height=20)
    assert clipped.tolist() == [[0.0, 2.0, 10.0, 20.0], [10.0, 2.0, 10.0, 4.0]]
    assert boxes.area_xyxy(clipped)[1].item() == 0.0
