"""First-in-first-out queues of features, filled in place."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def enqueue_(queue: Tensor, features: Tensor, pointer: int) -> int:
    """Write ``features`` (B, E) over the columns of ``queue`` (E, Q) from ``pointer`` on; returns the next pointer.

    Wraps around, so Q need not be a multiple of B; of more than Q features the last Q stay. In place: a loss that still
    needs the queue for its gradient must have run backward before.
    """
    size = queue.shape[1]
    end = (pointer + len(features)) % size
    features = features[-size:].to(queue.dtype)
    start = (end - len(features)) % size
    first = min(len(features), size - start)
    queue[:, start : start + first] = features[:first].T
    queue[:, : len(features) - first] = features[first:].T
    return end
