"""Mean average precision of multi-label classification: correct, over the classes present, and as AdaFocusV2 computes it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Absent = Literal["zero", "leave_out", "official"]


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(N, C) bool of labels (N, L) that are padded with -1."""
    hot = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    hot.scatter_(1, torch.where(labels < 0, num_classes, labels), True)
    return hot[:, :num_classes]


def average_precision(scores: Tensor, positives: Tensor) -> Tensor:
    """(C,) in percent: per class the mean over its positives of the precision at each; NaN without positives.

    Equal scores keep the order of the rows, as in the official codes; torchmetrics and scikit-learn join them.

    Args:
        scores: (N, C), larger is surer.
        positives: (N, C) bool.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = positives.gather(0, order).double()
    rank = torch.arange(1, len(scores) + 1, device=scores.device, dtype=torch.float64)[:, None]
    precision = hits.cumsum(dim=0) / rank
    return 100 * (precision * hits).sum(dim=0) / hits.sum(dim=0)


def mean_average_precision(scores: Tensor, labels: Tensor, absent: Absent = "leave_out") -> float:
    """mAP in percent of scores (N, C) with labels (N, L), padded with -1.

    ``absent`` classes, which no row has, are: "leave_out" of the mean (the default), counted as "zero" (mean over all C), or
    treated as the "official" code of AdaFocusV2 does: it renumbers the labels by their rank among those present, so that
    labels and columns no longer match as soon as one class is absent, and the last columns count as zero.
    """
    num_classes = scores.shape[1]
    if absent == "official":
        present = labels[labels >= 0].unique()
        labels = torch.where(labels >= 0, torch.searchsorted(present, labels.contiguous()), -1)
    values = average_precision(scores, multi_hot(labels, num_classes))
    mean = values.nanmean() if absent == "leave_out" else values.nan_to_num().mean()
    return float(mean.nan_to_num())
