"""Box algebra. A function's name says which convention it takes and gives; the last axis always holds the four numbers.

- `xyxy`: left, top, right, bottom
- `xywh`: left, top, width, height
- `cxcywh`: centre x, centre y, width, height

Everything is computed and returned in float32, whatever the input (half precision cannot hold pixel areas).
The unit is the caller's: pixels or fractions of the image.

Degenerate boxes are not an error: a box with no width or no height, and one whose corners are swapped, has area 0.
A ratio with an area of 0 below it counts as 0, in the forward and in the backward pass, so neither NaN nor inf appears.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """`[..., 4]` -> `[..., 4]`."""
    center, size = boxes.float().split(2, dim=-1)
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """`[..., 4]` -> `[..., 4]`."""
    low, high = boxes.float().split(2, dim=-1)
    return torch.cat((0.5 * (low + high), high - low), dim=-1)


def clip_xyxy(boxes: Tensor, width: float, height: float) -> Tensor:
    """`[..., 4]` with every corner moved into `[0, width] x [0, height]`; a box outside becomes one of area 0."""
    limit = torch.tensor([width, height, width, height], dtype=torch.float32, device=boxes.device)
    return torch.minimum(boxes.float().clamp(min=0), limit)


def area_xyxy(boxes: Tensor) -> Tensor:
    """`[..., 4]` -> `[...]`, never negative."""
    low, high = boxes.float().split(2, dim=-1)
    return (high - low).clamp(min=0).prod(dim=-1)


def iou_xyxy_elementwise(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of `[..., 4]` and `[..., 4]`, whose leading axes broadcast -> `[...]` in [0, 1]."""
    intersection, union = _intersection_and_union(first, second)
    return _ratio(intersection, union)


def giou_xyxy_elementwise(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of `[..., 4]` and `[..., 4]` -> `[...]` in [-1, 1].

    IoU minus the share of the smallest enclosing box that neither box covers.
    """
    intersection, union = _intersection_and_union(first, second)
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = area_xyxy(torch.cat((low, high), dim=-1))
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def iou_xyxy(first: Tensor, second: Tensor) -> Tensor:
    """IoU of every box of `[N, 4]` with every box of `[M, 4]` -> `[N, M]`."""
    return iou_xyxy_elementwise(first[:, None], second[None])


def giou_xyxy(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of every box of `[N, 4]` with every box of `[M, 4]` -> `[N, M]`."""
    return giou_xyxy_elementwise(first[:, None], second[None])


def _intersection_and_union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = area_xyxy(torch.cat((low, high), dim=-1))
    return intersection, area_xyxy(first) + area_xyxy(second) - intersection


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # The inner `where` keeps the division finite, so that the gradient of the discarded branch is 0 and not NaN.
    positive = whole > 0
    return torch.where(positive, part / torch.where(positive, whole, 1.0), 0.0)
