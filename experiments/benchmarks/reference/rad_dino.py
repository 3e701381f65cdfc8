"""The losses of DINOv2 over many prototypes in the official order of operations."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float) -> Tensor:
    """(n, K) targets by dividing the whole matrix by its row and column sums in turn."""
    q = (logits.float() / temperature).exp().T
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True)
        q /= prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= rows
    return (q * rows).T


def cross_entropy(logits: Tensor, targets: Tensor, row_weights: Tensor, temperature: float = 0.1) -> Tensor:
    """Weighted sum over rows of the cross-entropy of student logits (n, K)."""
    return -((targets * (logits.float() / temperature).log_softmax(dim=-1)).sum(dim=-1) * row_weights).sum()
