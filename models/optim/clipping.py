"""Gradient clipping by other units than the whole model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.sharded import Part, gradient_norms, local


@torch.no_grad()
def clip_each_(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale each parameter's gradient by ``min(1, max_norm / (norm + 1e-6))`` on its own (STRUCTURE's and DINO's rule)."""
    parameters = [p for p in parameters if p.grad is not None]
    if not parameters:
        return
    factors = [(max_norm / (norm + 1e-6)).clamp(max=1) for norm in gradient_norms(parameters)]
    torch._foreach_mul_([local(p.grad) for p in parameters], factors)


@torch.no_grad()
def clip_together_(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))`` of their joint norm, also where parameters are sharded."""
    parameters = [p for p in parameters if p.grad is not None]
    if not any(isinstance(p, DTensor | Part) for p in parameters):
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    factor = (max_norm / (torch.stack(gradient_norms(parameters)).norm() + 1e-6)).clamp(max=1)
    torch._foreach_mul_([local(p.grad) for p in parameters], factor)
