"""Boxes as shares of the image: overlaps of pairs and the two grounding losses (GIoU: arXiv 1902.09630)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_area, box_convert, generalized_box_iou_loss


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and union, of row i of ``a`` with row i of ``b``; corner boxes (N, 4), results (N,).

    Two boxes without area give NaN, as 0 / 0 does. (torchvision's ``box_iou`` compares all N x N pairs.)
    """
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    intersection = sides[:, 0] * sides[:, 1]
    union = box_area(a) + box_area(b) - intersection
    return intersection / union, union


def box_losses(predicted: Tensor, target: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L1 and GIoU losses of centre boxes (N, 4): sums over rows and coordinates, divided by the number of rows.

    Rows without a manipulated face have the target (0, 0, 0, 0) and count: the box learns to vanish. As in the official
    code, one box whose corners are crossed makes the GIoU loss of the whole batch 0 (a sigmoid cannot make such a box).

    Args:
        predicted: (N, 4) centre x, centre y, width, height as shares of the image.
        target: (N, 4) likewise.
        keep: (N,) bool; other rows are left out and not counted. At least one must be kept.
    """
    keep = torch.ones(len(predicted), dtype=torch.bool, device=predicted.device) if keep is None else keep
    rows = keep.sum()
    l1 = ((predicted - target).abs().sum(dim=1) * keep).sum() / rows
    a, b = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (predicted, target))
    crossed = ((a[:, 2:] < a[:, :2]) | (b[:, 2:] < b[:, :2])).any()
    counted = keep & ~crossed
    # Rows that do not count are replaced by the unit box so that NaNs do not propagate through masked gradients.
    unit = a.new_tensor([0.0, 0.0, 1.0, 1.0])
    a, b = (torch.where(counted[:, None], boxes, unit) for boxes in (a, b))
    return l1, (generalized_box_iou_loss(a, b, eps=0.0) * counted).sum() / rows
