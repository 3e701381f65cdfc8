"""Gradient clipping by other units than the whole model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def clip_each_(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale each parameter's gradient by ``min(1, max_norm / (norm + 1e-6))`` on its own (STRUCTURE's and DINO's rule)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    norms = torch._foreach_norm(gradients)
    factors = [(max_norm / (norm + 1e-6)).clamp(max=1) for norm in norms]
    torch._foreach_mul_(gradients, factors)
