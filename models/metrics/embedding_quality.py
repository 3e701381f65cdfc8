"""Does an embedding keep the neighbourhoods of the features it came from? Trustworthiness and continuity."""

from __future__ import annotations

import torch
from torch import Tensor

from models.sizes import NEIGHBOURS


def trustworthiness(x: Tensor, z: Tensor, k: int = 5) -> float:
    """1 minus the weight of intruders among the ``k`` nearest of ``z`` (n, Dz) that are far away in ``x`` (n, Dx).

    ``1 - 2 / (n k (2n - 3k - 1)) * sum of max(rank in x - k, 0)`` (Venna and Kaski, 2001), by Euclidean distance, tile by
    tile. Continuity is the same with ``x`` and ``z`` exchanged. Raises ValueError unless ``k < n / 2``.
    """
    n = len(x)
    if not 0 < k < n / 2:
        raise ValueError(f"k={k} must be positive and less than half of the {n} samples")
    total, step = 0, NEIGHBOURS.rows(x.device, n)
    for first in range(0, n, step):
        rows = torch.arange(first, min(first + step, n), device=x.device)
        to_z, to_x = torch.cdist(z[rows], z), torch.cdist(x[rows], x)
        for distances in (to_z, to_x):
            distances[torch.arange(len(rows)), rows] = -1  # itself comes first, whatever rounding makes of its distance
        near = to_z.topk(k + 1, dim=1, largest=False).indices
        near = near[near != rows[:, None]].view(len(rows), k)
        ranks = torch.stack([(to_x < to_x.gather(1, near[:, j : j + 1])).sum(dim=1) for j in range(k)])
        total += int((ranks - k).clamp(min=0).sum())
    return 1 - 2 * total / (n * k * (2 * n - 3 * k - 1))
