"""The grounding losses of HAMMER (arXiv 2304.02556, section 3.3): boxes as shares of the image, and manipulated tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_convert, generalized_box_iou_loss

from models.batch import IGNORE_INDEX


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and union, of row i of ``a`` with row i of ``b``; corner boxes (N, 4), results (N,).

    Two boxes without area give NaN, as 0 / 0 does. (torchvision's ``box_iou`` compares all N x N pairs.)
    """
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    intersection = sides[:, 0] * sides[:, 1]
    union = box_area(a) + box_area(b) - intersection
    return intersection / union, union


def box_losses(predicted: Tensor, target: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L1 and GIoU (arXiv 1902.09630) losses of centre boxes (N, 4): sums over rows and coordinates, over the number of rows.

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


def token_grounding(
    logits: Tensor, labels: Tensor, teacher: Tensor | None = None, alpha: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """``(1 - alpha) CE + alpha KD``, both means over the tokens of the batch that are not padding; CE alone without teacher.

    Args:
        logits: (B, T, 2) of the online model.
        teacher: (B, T, 2) of the momentum model: ``KD = -sum_c softmax(teacher)_c log p_c``.
        labels: (B, T), 1 manipulated, 0 not, IGNORE_INDEX padding.
        label_smoothing: of CE.
    """
    logits = logits.float()
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing)
    if teacher is None:
        return ce
    labelled = labels != IGNORE_INDEX
    kd = -(teacher.detach().float().softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return (1 - alpha) * ce + alpha * torch.where(labelled, kd, 0.0).sum() / labelled.sum()
