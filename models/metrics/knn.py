"""Weighted k-nearest-neighbour classification of frozen features (DINO, arXiv 2104.14294; SAIL part I)."""

from __future__ import annotations

import torch
from torch import Tensor


def knn_votes(
    train: Tensor, train_labels: Tensor, test: Tensor, classes: int, k: int, temperature: float = 0.07, tile: int = 1024
) -> Tensor:
    """Votes (N, classes): each of the k nearest of ``train`` (M, D) adds exp(similarity / temperature) to its class.

    Features are taken as given, so normalise them for cosines. Memory is O(tile * M).
    """
    k = min(k, len(train))
    votes = []
    for block in test.split(tile):
        similarity, nearest = (block @ train.T).topk(k, dim=1)
        weights = (similarity / temperature).exp()
        out = torch.zeros(len(block), classes, dtype=weights.dtype, device=weights.device)
        votes.append(out.scatter_add_(1, train_labels[nearest], weights))
    return torch.cat(votes)
