"""Mean intersection over union of label maps, accumulated over a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor


def intersections_and_unions(predicted: Tensor, labels: Tensor, classes: int, ignore: int = 255) -> Tensor:
    """Pixels (2, classes) int64 of one image or many: intersection and union of each class.

    ``predicted`` and ``labels`` are integer maps of one shape; pixels labelled ``ignore`` do not count. Raises ValueError
    for a label that is neither a class nor ``ignore``.
    """
    valid = labels != ignore
    predicted, labels = predicted[valid].long(), labels[valid].long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels reach from {int(labels.min())} to {int(labels.max())}, but there are {classes} classes")
    right = torch.bincount(labels[predicted == labels], minlength=classes)
    return torch.stack(
        [right, torch.bincount(predicted, minlength=classes) + torch.bincount(labels, minlength=classes) - right]
    )


def mean_iou(counts: Tensor) -> tuple[float, Tensor]:
    """Summed counts (2, classes) to the mean IoU and that of each class (classes,), percent; NaN for a class that never
    occurs, which the mean leaves out."""
    per_class = 100 * counts[0].double() / counts[1].double()
    return per_class.nanmean().item(), per_class
