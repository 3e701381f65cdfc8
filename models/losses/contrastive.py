"""Contrastive losses between images and texts, as functions of un-normalised embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LossOutput(NamedTuple):
    """``losses`` are summed by the Lightning module; ``report`` is only logged."""

    losses: dict[str, Tensor]
    report: dict[str, Tensor]


class SigmoidTerms(NamedTuple):
    """Scalars of one image-text matrix: the sum over all entries, and its positive and negative parts."""

    total: Tensor
    positive: Tensor
    negative: Tensor


def sigmoid_terms(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> SigmoidTerms:
    """Sums of ``-log sigmoid(l_ij s_ij)`` over an image-text matrix, ``s_ij = scale * cos(image_i, text_j) + bias``.

    ``l_ij`` is +1 on the diagonal and -1 elsewhere (SigLIP, arXiv 2303.15343, equation 1).

    Args:
        image, text: embeddings (B, D), not normalised.
        logit_scale: the scale itself, not its log (1,).
        logit_bias: (1,).
    """
    logits = logit_scale * (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T) + logit_bias
    diagonal = logits.diagonal()
    # softplus(-s) = softplus(s) - s: one softplus over the matrix serves both labels.
    everything = F.softplus(logits).sum()
    positive = F.softplus(-diagonal).sum()
    total = everything - diagonal.sum()
    return SigmoidTerms(total, positive.detach(), (total - positive).detach())


class SigmoidLoss(nn.Module):
    """SAIL's multi-positive sigmoid loss (arXiv 2412.04616, section 3.3): the mean over the texts given for each image.

    Args:
        reduction: 'pairs' divides by B², SAIL's choice; 'batch' by B, as SigLIP does.
    """

    def __init__(self, reduction: Literal["pairs", "batch"] = "pairs"):
        super().__init__()
        self.reduction = reduction

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        """``image`` (B, D) and each of ``texts`` (B, D), row i of every text belonging to image i."""
        size = image.shape[0]
        divisor = size * size if self.reduction == "pairs" else size
        terms = [sigmoid_terms(image, text, logit_scale, logit_bias) for text in texts]
        loss = torch.stack([term.total for term in terms]).mean() / divisor
        report = {"positive_loss": terms[0].positive / divisor, "negative_loss": terms[0].negative / divisor}
        if len(terms) > 1:
            report["extra_loss"] = torch.stack([term.total.detach() for term in terms[1:]]).mean() / divisor
        return LossOutput({"contrastive": loss}, report)


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv 2103.00020). Embeddings (B, D)."""
    logits = logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class InfoNCELoss(nn.Module):
    """CLIP's loss on the first text of each image; further texts and the bias are ignored, as in SAIL's ablation."""

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        return LossOutput({"contrastive": info_nce(image, texts[0], logit_scale)}, {})
