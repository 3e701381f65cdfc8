"""Projectors: the trainable maps from frozen features to the shared embedding space. All take ``(in_dim, out_dim, ...)``.

SAIL's weights start Xavier-uniform with biases at zero; freeze-align's and STRUCTURE's start as torch's own layers do.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.autocast import add_product, product_dtype
from models.sizes import hidden_rows


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
        return self._gated(x, None)

    def after_norm(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """``self(norm(x))``, without a gradient towards ``x`` where ``x`` needs none: cheaper on frozen features."""
        return self(norm(x)) if x.requires_grad or norm.bias is None else self._gated(x, norm)

    def _gated(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        affine = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
        up, down = self.gate_and_value, self.down
        learns = torch.is_grad_enabled()
        out = _Gated.apply(x.flatten(0, -2), *affine, up.weight, up.bias, down.weight, down.bias, self.clamp, learns)
        return out.unflatten(0, x.shape[:-1])


class _Gated(torch.autograd.Function):
    """The gated unit behind an optional LayerNorm of its input, rows in chunks.

    Only the two limited branches are kept for the backward pass; their product is made again there. With a norm there is
    no gradient towards the input, and those of the norm's weight and bias follow from the one of the next weight:
    for ``u = W (g * n + b) + c`` with normalised input n, let ``M = (dL/du)^T n``. Then ``dL/dW = M * g + dL/dc b^T``,
    ``dL/dg = colsum(W * M)`` and ``dL/db = W^T dL/dc``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        up_weight: Tensor,
        up_bias: Tensor,
        down_weight: Tensor,
        down_bias: Tensor,
        clamp: float,
        learns: bool,
    ) -> Tensor:
        ctx.dtype, ctx.eps, ctx.clamp = product_dtype(x.device, up_weight.dtype), eps, clamp
        up, down = up_weight.to(ctx.dtype), down_weight.to(ctx.dtype)
        ctx.rows = hidden_rows(x.device, len(x), down.shape[1], ctx.dtype.itemsize)
        branches = x.new_empty(len(x) if learns else min(ctx.rows, len(x)), len(up), dtype=ctx.dtype)
        out = x.new_empty(len(x), len(down), dtype=ctx.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _chunks(len(x), ctx.rows):
                h = x[rows]
                if norm_weight is not None:
                    h = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, eps)
                both = branches[rows] if learns else branches[: len(h)]
                torch.addmm(up_bias.to(ctx.dtype), h.to(ctx.dtype), up.T, out=both)
                gate, value = both.chunk(2, dim=-1)
                # ReLU6 alone bounds the gate to [0, 6], so its clamp at ±clamp is the identity for any clamp >= 6.
                gate.clamp_(0, min(6.0, clamp))
                value.clamp_(-clamp, clamp)
                torch.addmm(down_bias.to(ctx.dtype), gate * value, down.T, out=out[rows])
        ctx.save_for_backward(x, norm_weight, norm_bias, up_weight, down_weight, branches)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, up_weight, down_weight, branches = ctx.saved_tensors
        up, down = up_weight.to(ctx.dtype), down_weight.to(ctx.dtype)
        grad_out = grad_out.to(ctx.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        empty = torch.empty_like if len(x) else torch.zeros_like
        grad_up, grad_down = empty(up_weight), empty(down_weight)
        grad_up_bias = up_weight.new_zeros(len(up))
        for rows in _chunks(len(x), ctx.rows):
            gate, value = branches[rows].chunk(2, dim=-1)
            add_product(grad_down, grad_out[rows].T, gate * value, first=rows.start == 0)
            grad_branches = torch.empty_like(branches[rows])
            grad_gate, grad_value = grad_branches.chunk(2, dim=-1)
            grad_hidden = torch.mm(grad_out[rows], down)
            _limited_backward(grad_hidden * gate, value, -ctx.clamp, ctx.clamp, grad_value)
            _limited_backward(grad_hidden.mul_(value), gate, 0.0, min(6.0, ctx.clamp), grad_gate)
            h = x[rows] if norm_weight is None else F.layer_norm(x[rows], x.shape[-1:], eps=ctx.eps)
            add_product(grad_up, grad_branches.T, h.to(ctx.dtype), first=rows.start == 0)
            grad_up_bias += grad_branches.sum(dim=0)
            if grad_x is not None:
                grad_x[rows] = torch.mm(grad_branches, up).to(x.dtype)
        grad_norm_weight = grad_norm_bias = None
        if norm_weight is not None:
            grad_norm_weight = sum((grad_up[r] * up_weight[r]).sum(dim=0) for r in _chunks(len(up), ctx.rows))
            grad_norm_bias = up_weight.T @ grad_up_bias
            grad_up.mul_(norm_weight).addr_(grad_up_bias, norm_bias)
        grads = (
            grad_norm_weight,
            grad_norm_bias,
            None,
            grad_up,
            grad_up_bias,
            grad_down,
            grad_out.sum(dim=0).to(up_weight.dtype),
        )
        return grad_x, *grads, None, None


def _limited_backward(grad: Tensor, limited: Tensor, low: float, high: float, out: Tensor) -> None:
    """``grad`` where a limited value lies strictly inside its bounds, as ReLU6's derivative has it, 0 elsewhere."""
    torch.ops.aten.hardtanh_backward.grad_input(grad, limited, low, high, grad_input=out)


def _chunks(rows: int, together: int) -> list[slice]:
    return [slice(start, min(start + together, rows)) for start in range(0, rows, together)]


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

    STRUCTURE's ResLowRankHead, the "MLP" of its tables (arXiv 2506.16895).
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


class CentredProjector(nn.Module):
    """``(x - mean) W``: what a closed form sets, see :mod:`models.structure.csa`. ``(..., in_dim) -> (..., out_dim)``."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.out_dim = out_dim
        self.register_buffer("mean", torch.zeros(in_dim))
        self.map = nn.Parameter(torch.empty(in_dim, out_dim))
        nn.init.orthogonal_(self.map)

    @torch.no_grad()
    def set_map(self, mean: Tensor, mapping: Tensor) -> None:
        """Take the mean (in_dim,) and the map (in_dim, out_dim)."""
        self.mean.copy_(mean)
        self.map.copy_(mapping)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.map
