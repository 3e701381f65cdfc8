"""Projectors: the trainable maps from frozen features to the shared embedding space. All take ``(in_dim, out_dim, ...)``.

SAIL's weights start Xavier-uniform with biases at zero; freeze-align's and STRUCTURE's start as torch's own layers do.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _xavier(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


class LinearProjector(nn.Linear):
    """One affine map (SAIL's alignment probing, arXiv 2412.04616, section 3.1). ``(..., in_dim) -> (..., out_dim)``.

    Args:
        init: 'xavier' with zero biases (SAIL), or 'torch' (freeze-align, STRUCTURE).
    """

    def __init__(self, in_dim: int, out_dim: int, init: Literal["xavier", "torch"] = "xavier"):
        super().__init__(in_dim, out_dim)
        if init == "xavier":
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


class TokenProjector(nn.Module):
    """A linear beside a two-layer branch: ``A u + a + C GELU(B u + b) + c`` of ``u = Dropout(LayerNorm(x))``.

    freeze-align's ``patch`` projector (arXiv 2409.19425, section 3.1), for single tokens. ``(..., in) -> (..., out)``.
    """

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_dim, out_dim)
        self.up = nn.Linear(in_dim, out_dim)
        self.down = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        return self.linear(x) + self.down(F.gelu(self.up(x)))


class ResidualMLPProjector(nn.Module):
    """``LayerNorm(p + Dropout(F GELU(p) + f))`` of ``p = P x + b``, freeze-align's ``mlp``. ``(..., in) -> (..., out)``."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.1):
        super().__init__()
        self.projection = nn.Linear(in_dim, out_dim)
        self.down = nn.Linear(out_dim, out_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x)
        return self.norm(self.dropout(self.down(F.gelu(x))) + x)


class ReLUProjector(nn.Sequential):
    """``layers`` affine maps with ReLU between (STRUCTURE's MLPAlignmentLayer). ``(..., in_dim) -> (..., out_dim)``."""

    def __init__(self, in_dim: int, out_dim: int, layers: int = 2):
        super().__init__(nn.Linear(in_dim, out_dim))
        for _ in range(layers - 1):
            self.extend([nn.ReLU(), nn.Linear(out_dim, out_dim)])


class LowRankProjector(nn.Module):
    """A linear map and a gated low-rank branch, ``P x + sigmoid(gate) W2 Dropout(GELU(W1 x))``, without biases.

    STRUCTURE's ResLowRankHead, the "MLP" of its tables (arXiv 2506.16895; specification, section 2.2).
    ``(..., in_dim) -> (..., out_dim)``.

    Args:
        rank: of the branch; None: ``max(8, out_dim // 4)``.
        gate: where the gate starts, in [0, 1). Official: 0, where neither the gate nor W2 (zero at the start) ever gets
            a gradient, so that the projector stays the linear map P. Any gate above 0 trains the branch.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int | None = None, dropout: float = 0.1, gate: float = 0.1):
        super().__init__()
        rank = max(8, out_dim // 4) if rank is None else rank
        self.direct = nn.Linear(in_dim, out_dim, bias=False)
        self.down = nn.Linear(in_dim, rank, bias=False)
        self.up = nn.Linear(rank, out_dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.direct, self.down):
            nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(self.up.weight)
        self.gate_logit = nn.Parameter(torch.tensor(-math.inf if gate == 0 else math.log(gate / (1 - gate))))

    def forward(self, x: Tensor) -> Tensor:
        return self.direct(x) + self.gate_logit.sigmoid() * self.up(self.dropout(F.gelu(self.down(x))))
