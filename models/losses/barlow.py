"""Barlow Twins between modalities (arXiv 2103.03230), as SAIL's code defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from models.losses.contrastive import LossOutput, PairLoss
from models.losses.gather import GradientScope, gather_texts


def barlow_twins(image: Tensor, text: Tensor, off_diagonal_weight: float = 0.0051) -> Tensor:
    """``sum_i (C_ii - 1)² + w sum_(i≠j) C_ij²`` of the cross-correlation C of the two embeddings (B, D).

    Each dimension is z-scored over the batch with the unbiased deviation and no epsilon (official).

    Args:
        image: (B, D).
        text: (B, D).
        off_diagonal_weight: w.
    """
    image = (image - image.mean(0)) / image.std(0)
    text = (text - text.mean(0)) / text.std(0)
    correlation = image.T @ text / len(image)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + off_diagonal_weight * off_diagonal


class BarlowTwinsLoss(PairLoss):
    """Barlow Twins on the first text of each image; scale and bias are not used.

    Args:
        off_diagonal_weight: see :func:`barlow_twins`.
        scope: 'all' takes the correlation over the batches of all ranks, 'rank' over each rank's own (SAIL's code), which
            changes the loss with the number of ranks. In evaluation nothing is exchanged.
    """

    def __init__(self, off_diagonal_weight: float = 0.0051, scope: Literal["rank", "all"] = "all"):
        super().__init__()
        self.off_diagonal_weight, self.scope = off_diagonal_weight, GradientScope(scope)

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        scope = self.scope if self.training else GradientScope.RANK
        image, text = (gather_texts(side, scope)[0] for side in (image, texts[0]))
        return LossOutput({"contrastive": barlow_twins(image, text, self.off_diagonal_weight)}, {})
