"""Saliency supervision: what a classifier makes of each snippet alone becomes the target of AV-TeST.

All of it is this project's definition; the abstract does not say how saliency is learnt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def row_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy of logits (B, n, C) with one label (B,) per video, mean over all B*n rows."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.repeat_interleave(logits.shape[1]))


def snippet_confidence(teacher: Tensor, labels: Tensor) -> Tensor:
    """(B, T): mean over the true labels of softmax(teacher)[label].

    Args:
        teacher: (B, T, C) logits.
        labels: (B, C) multi-hot, at least one class each.
    """
    true = labels.to(torch.float32)
    probability = teacher.float().softmax(dim=-1)
    return torch.einsum("btc,bc->bt", probability, true) / true.sum(dim=1, keepdim=True).clamp_min(1)


def saliency_target(confidence: Tensor, temperature: float = 1.0, eps: float = 1e-8) -> Tensor:
    """(B, T) distribution q over snippets: ``(c + eps)^(1/temperature)``, normalised."""
    return ((confidence + eps).log() / temperature).softmax(dim=1)


def saliency_kl(scores: Tensor, target: Tensor) -> Tensor:
    """KL(q || softmax(scores)), mean over the batch; scores of -inf (padding) must have no target."""
    log_predicted = scores.float().log_softmax(dim=1)
    terms = torch.xlogy(target, target) - target * log_predicted.masked_fill(target == 0, 0)
    return terms.sum(dim=1).mean()


def saliency_rank(scores: Tensor, confidence: Tensor, margin: float = 0.1) -> Tensor:
    """Hinge ``max(0, margin - (s_i - s_j))`` over ordered pairs of snippets of a video with c_i > c_j, mean over all."""
    ahead = confidence[:, :, None] > confidence[:, None, :]
    hinge = (margin - (scores[:, :, None] - scores[:, None, :])).clamp_min(0)
    return torch.where(ahead, hinge, 0).sum() / ahead.sum().clamp_min(1)


def saliency_bce(scores: Tensor, confidence: Tensor, eps: float = 1e-8) -> Tensor:
    """Binary cross-entropy of each score with the confidence stretched to [0, 1] within its video, mean."""
    low = confidence.amin(dim=1, keepdim=True)
    target = (confidence - low) / (confidence.amax(dim=1, keepdim=True) - low + eps)
    return F.binary_cross_entropy_with_logits(scores.float(), target)
