"""Boxes as shares of the image: conversions, overlaps and the two grounding losses (GIoU: arXiv 1902.09630)."""

from __future__ import annotations

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(N, 4) centre x, centre y, width, height to x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def to_centres(boxes: Tensor) -> Tensor:
    """(N, 4) x1, y1, x2, y2 to centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """(N,) areas of corner boxes (N, 4)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and union, of row i of ``a`` with row i of ``b``; corner boxes (N, 4), results (N,).

    Two boxes without area give NaN, as 0 / 0 does.
    """
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    intersection = sides[:, 0] * sides[:, 1]
    union = area(a) + area(b) - intersection
    return intersection / union, union


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """(N,) generalised intersection over union of row i of ``a`` with row i of ``b``; corner boxes (N, 4)."""
    iou, union = paired_iou(a, b)
    sides = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0)
    hull = sides[:, 0] * sides[:, 1]
    return iou - (hull - union) / hull


def box_losses(predicted: Tensor, target: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L1 and GIoU losses of centre boxes (N, 4): sums over rows and coordinates, divided by the number of rows.

    Rows without a manipulated face have the target (0, 0, 0, 0) and count: the box learns to vanish. As in the official
    code, one box whose corners are crossed makes the GIoU loss of the whole batch 0 (a sigmoid cannot make such a box).

    Args:
        keep: (N,) bool; other rows are left out and not counted. At least one must be kept.
    """
    keep = torch.ones(len(predicted), dtype=torch.bool, device=predicted.device) if keep is None else keep
    rows = keep.sum()
    l1 = ((predicted - target).abs().sum(dim=1) * keep).sum() / rows
    a, b = to_corners(predicted), to_corners(target)
    crossed = ((a[:, 2:] < a[:, :2]) | (b[:, 2:] < b[:, :2])).any()
    counted = keep & ~crossed
    # Rows that do not count get a harmless box, lest the NaN of an empty one come through its zero gradient.
    whole = a.new_tensor([0.0, 0.0, 1.0, 1.0])
    a, b = (torch.where(counted[:, None], boxes, whole) for boxes in (a, b))
    return l1, ((1 - paired_giou(a, b)) * counted).sum() / rows
