"""Overlap of areas as Dice: twice the intersection over the sum of the areas."""

from __future__ import annotations

import torch
from torch import Tensor


def dice_per_image(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """(N, C) float64 of label maps (N, H, W); NaN where a class is in neither."""
    classes = torch.arange(num_classes, device=target.device)[:, None, None]
    return dice_of_masks(*(labels[:, None] == classes for labels in (predicted, target)))


def dice_of_masks(predicted: Tensor, target: Tensor) -> Tensor:
    """(N, C) float64 of masks (N, C, H, W) bool, which may overlap; NaN where both are empty."""
    p, t = predicted.flatten(2), target.flatten(2)
    return 2 * (p & t).sum(-1).double() / (p.sum(-1) + t.sum(-1)).double()


def dice_per_class(per_image: Tensor) -> Tensor:
    """(C,) mean over the images in which a class is, of (N, C) that may be NaN."""
    return per_image.nanmean(dim=0)
