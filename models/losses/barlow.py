"""Barlow Twins between modalities (arXiv 2103.03230), as SAIL's code defines it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.losses.contrastive import LossOutput


def barlow_twins(image: Tensor, text: Tensor, off_diagonal_weight: float = 0.0051) -> Tensor:
    """Pulls the cross-correlation of the two embeddings (B, D) to the identity.

    Each dimension is z-scored over the batch with the unbiased deviation and no epsilon (official).
    """
    image = (image - image.mean(0)) / image.std(0)
    text = (text - text.mean(0)) / text.std(0)
    correlation = image.T @ text / len(image)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + off_diagonal_weight * off_diagonal


class BarlowTwinsLoss(nn.Module):
    """Barlow Twins on the first text of each image; scale and bias are not used."""

    def __init__(self, off_diagonal_weight: float = 0.0051):
        super().__init__()
        self.off_diagonal_weight = off_diagonal_weight

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        return LossOutput({"contrastive": barlow_twins(image, texts[0], self.off_diagonal_weight)}, {})
