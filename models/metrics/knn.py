"""Weighted k-nearest-neighbour classification of frozen features (DINO, arXiv 2104.14294; SAIL part I)."""

from __future__ import annotations

import torch
from torch import Tensor

from models.sizes import VOTES


@torch.no_grad()
def knn_votes(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    num_classes: int,
    k: int,
    temperature: float = 0.07,
    tile_entries: int | None = None,
) -> Tensor:
    """Votes (N, num_classes): each of the k nearest of ``train`` (M, D) adds exp(similarity / temperature) to its class.

    Features are taken as given, so normalise them for cosines. ``tile_entries`` similarities are held at once, by default as
    many as suit the device. With fewer than ``k`` training rows all of them vote.
    """
    votes = []
    for block in test.split(max(1, (tile_entries or VOTES.entries(test.device)) // len(train))):
        similarity, nearest = (block @ train.T).topk(min(k, len(train)), dim=1)
        out = similarity.new_zeros(len(block), num_classes)
        votes.append(out.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp()))
    return torch.cat(votes)
