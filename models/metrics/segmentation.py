"""Mean intersection over union of label maps, accumulated over a whole data set."""

from __future__ import annotations

from torch import Tensor


def mean_iou(matrix: Tensor) -> tuple[float, Tensor]:
    """Summed confusion matrices (C, C) to the mean IoU and that of each class (C,), in percent.

    A class that never occurs is NaN, and the mean leaves it out.
    """
    right = matrix.diagonal().double()
    per_class = 100 * right / (matrix.sum(dim=0) + matrix.sum(dim=1) - right)
    return per_class.nanmean().item(), per_class
