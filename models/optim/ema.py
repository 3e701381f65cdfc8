"""Exponential moving averages of whole parameter lists, in place and in one fused call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from models.sharded import local


@torch.no_grad()
def ema_update_(averages: Iterable[Tensor], values: Iterable[Tensor], decay: float) -> None:
    """``average <- decay * average + (1 - decay) * value`` for every pair, without a temporary copy of any of them.

    Of sharded tensors each rank moves its part; both of a pair must be sharded alike.

    Written as ``average + (1 - decay) * (value - average)``, which is the same up to rounding. Raises ValueError when
    the lists are of different length.
    """
    averages, values = [local(average) for average in averages], [local(value) for value in values]
    if len(averages) != len(values):
        raise ValueError(f"{len(averages)} averages of {len(values)} values")
    if averages:
        torch._foreach_lerp_(averages, values, 1 - decay)
