"""Ranking metrics of each label of a multi-label task, with equal scores joined as scikit-learn does, and their uncertainty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def auroc(scores: Tensor, positives: Tensor) -> Tensor:
    """(C,) area under the ROC curve, ties counting half; NaN for a label without positives or without negatives.

    Args:
        scores: (N, C), larger is surer.
        positives: (N, C) bool.
    """
    order = scores.argsort(dim=0)
    ranked = scores.gather(0, order)
    ranks = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    columns = []
    for column, values in zip(order.T, ranked.T, strict=True):
        _, group, count = values.unique_consecutive(return_inverse=True, return_counts=True)
        mean_rank = ranks.new_zeros(len(count)).index_add_(0, group, ranks) / count
        columns.append(torch.empty_like(ranks).scatter_(0, column, mean_rank[group]))
    positive_count, negative_count = positives.sum(dim=0).double(), (~positives).sum(dim=0).double()
    rank_sum = (torch.stack(columns, dim=1) * positives).sum(dim=0)
    return (rank_sum - positive_count * (positive_count + 1) / 2) / (positive_count * negative_count)


def tied_average_precision(scores: Tensor, positives: Tensor) -> Tensor:
    """(C,) step-wise area under the precision-recall curve; equal scores form one step; NaN for a label without positives.

    Args:
        scores: (N, C), larger is surer.
        positives: (N, C) bool.
    """
    order = scores.argsort(dim=0, descending=True)
    values, hits = scores.gather(0, order), positives.gather(0, order).double()
    ends = torch.cat([values[1:] != values[:-1], torch.ones_like(values[:1], dtype=torch.bool)])
    out = []
    for end, column in zip(ends.T, hits.T, strict=True):
        last = end.nonzero().flatten()
        hits_so_far = column.cumsum(0)[last]
        gained = torch.diff(hits_so_far, prepend=hits_so_far.new_zeros(1))
        out.append((gained * hits_so_far / (last + 1)).sum() / hits_so_far[-1])
    return torch.stack(out)


def bootstrap_interval(
    metric: Callable[[Tensor, Tensor], Tensor],
    scores: Tensor,
    positives: Tensor,
    draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over labels of ``metric`` when rows are drawn with replacement.

    Args:
        metric: ``(scores, positives) -> (C,)``; labels that are NaN in a draw are left out of its mean.
        scores, positives: (N, C).
        draws: number of resamples.
        level: share of the resamples inside the interval.
        seed: of the resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        rows = torch.randint(len(scores), (len(scores),), generator=generator)
        values.append(metric(scores[rows], positives[rows]).nanmean())
    tail = (1 - level) / 2
    low, high = torch.stack(values).nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)
