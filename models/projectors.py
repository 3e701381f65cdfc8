"""Projectors: the trainable maps from frozen features to the shared embedding space. All take ``(in_dim, out_dim, ...)``.

Weights start Xavier-uniform, biases at zero, as in SAIL's code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _xavier(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


class LinearProjector(nn.Linear):
    """One affine map (SAIL's alignment probing, arXiv 2412.04616, section 3.1). ``(..., in_dim) -> (..., out_dim)``."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        _xavier(self)


class MLPProjector(nn.Module):
    """Two layers with an exact GELU. ``(..., in_dim) -> (..., out_dim)``.

    Args:
        hidden_factor: hidden width in units of ``in_dim`` (official: 4).
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_factor: int = 4):
        super().__init__()
        self.up = nn.Linear(in_dim, hidden_factor * in_dim)
        self.down = nn.Linear(hidden_factor * in_dim, out_dim)
        _xavier(self.up, self.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class GatedProjector(nn.Module):
    """SAIL's gated linear unit, ``W3(ReLU6(W1 x) * (W2 x))`` (arXiv 2412.04616, section 3.2). ``(..., in) -> (..., out)``.

    The two input maps are one weight, gate rows first, so that one matrix product serves both.

    Args:
        width_factor: hidden width in units of ``in_dim`` (official: 8).
        clamp: both branches are limited to ±this, as in the official code, which guards half precision with it.
    """

    def __init__(self, in_dim: int, out_dim: int, width_factor: int = 8, clamp: float = 1e3):
        super().__init__()
        self.clamp = clamp
        self.gate_and_value = nn.Linear(in_dim, 2 * width_factor * in_dim)
        self.down = nn.Linear(width_factor * in_dim, out_dim)
        _xavier(self.gate_and_value, self.down)
        with torch.no_grad():  # two matrices in one: Xavier depends on the fan-out, so each half is drawn by itself
            for half in self.gate_and_value.weight.chunk(2):
                nn.init.xavier_uniform_(half)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        # ReLU6 alone bounds the gate to [0, 6], so its clamp at ±clamp is the identity for any clamp >= 6.
        return self.down(torch.clamp(gate, 0, min(6.0, self.clamp)) * torch.clamp(value, -self.clamp, self.clamp))
