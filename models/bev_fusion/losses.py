"""Losses of a two-stage occupancy decoder (ours; the paper's losses are not established)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.batch import VOID_LABEL


def coarse_target(label: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B, 2H, 2W) to occupancy (B, H, W) of 2x2 blocks and whether a block has any labelled cell, both float."""
    blocks = label.unfold(1, 2, 2).unfold(2, 2, 2).flatten(-2)
    known = blocks != VOID_LABEL
    return ((blocks > 0) & known).any(-1).float(), known.any(-1).float()


def occupancy_loss(logit: Tensor, target: Tensor, valid: Tensor, positive_weight: float = 3.0) -> Tensor:
    """Binary cross-entropy of (B, 1, H, W) logits, mean over the valid cells (B, H, W); 0 without any."""
    weight = torch.tensor(positive_weight, device=logit.device)
    loss = F.binary_cross_entropy_with_logits(logit[:, 0].float(), target, pos_weight=weight, reduction="none")
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def class_loss(logits: Tensor, label: Tensor, class_weight: Tensor) -> Tensor:
    """Weighted cross-entropy of (B, K, H, W) over labelled cells, divided by the sum of the weights used; 0 without any."""
    weight = class_weight.to(logits.device, torch.float32)
    total = F.cross_entropy(logits.float(), label, weight, ignore_index=VOID_LABEL, reduction="sum")
    used = weight[label[label != VOID_LABEL]].sum()
    return total / used.clamp(min=1e-12)


def dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    """1 - soft Dice, smoothed by 1, mean over the classes from 1 on; sums run over all labelled cells of the batch."""
    num_classes = logits.shape[1]
    known = (label != VOID_LABEL)[:, None]
    p = logits.float().softmax(1) * known
    y = F.one_hot(label.masked_fill(~known[:, 0], 0), num_classes).movedim(-1, 1) * known
    both, either = (p * y).sum((0, 2, 3)), p.sum((0, 2, 3)) + y.sum((0, 2, 3))
    return (1 - (2 * both + 1) / (either + 1))[1:].mean()


class OccupancyLoss(nn.Module):
    """Coarse occupancy, classes and Dice as three terms.

    Args:
        class_weight: K numbers for the cross-entropy; null is 1 for free space and 5 for every other class.
        positive_weight: of occupied cells in the coarse term.
    """

    def __init__(self, class_weight: Sequence[float] | None = None, positive_weight: float = 3.0):
        super().__init__()
        self.class_weight, self.positive_weight = class_weight, positive_weight

    def forward(self, coarse: Tensor, classes: Tensor, label: Tensor) -> Mapping[str, Tensor]:
        """(B, 1, H, W) and (B, K, 2H, 2W) logits, (B, 2H, 2W) int64 labels with 255 for unknown."""
        weight = torch.tensor(self.class_weight or [1.0] + [5.0] * (classes.shape[1] - 1))
        return {
            "occupancy": occupancy_loss(coarse, *coarse_target(label), self.positive_weight),
            "class": class_loss(classes, label, weight),
            "dice": dice_loss(classes, label),
        }
