"""Real parts of Fourier transforms of real inputs: even functions of the frequency, of which half is computed.

The real part of frequency k is ``sum_n x[n] cos(2 pi k n / N)``. Entries n and N - n have the same cosine, so their sum is all
that is read (:func:`fold`), and frequencies k and N - k have the same value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def real_spectrum(x: Tensor) -> Tensor:
    """The real part of the transform of a real ``x`` along its last axis."""
    n = x.shape[-1]
    half = torch.fft.rfft(x.float()).real
    return torch.cat([half, half[..., 1 : (n + 1) // 2].flip(-1)], dim=-1)


def fold(x: Tensor) -> Tensor:
    """The sums of rows n and N - n: (B, N, W) to (B, N // 2 + 1, W). Linear layers may follow instead of going before."""
    return x if x.shape[1] < 3 else _Fold.apply(x)


def multiplicity(count: int, device: torch.device) -> Tensor:
    """(N // 2 + 1,) float32: of how many of ``count`` rows each row of :func:`fold` is the sum; also, as how many of
    ``count`` frequencies each one of :func:`half_spectrum` counts."""
    both = torch.full((count // 2 + 1,) if count > 1 else (1,), 2.0, device=device)
    both[0] = 1
    if count % 2 == 0:
        both[-1] = 1
    return both


def half_spectrum(folded: Tensor, count: int) -> Tensor:
    """The real parts (B, N // 2 + 1, W) of frequencies 0 to N / 2 of ``count`` = N rows that were folded."""
    return folded if count == 1 else _HalfSpectrum.apply(folded.float(), count)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.pairs = (x.shape[1] - 1) // 2
        out = x[:, : x.shape[1] - ctx.pairs].clone()
        out[:, 1 : 1 + ctx.pairs] += x[:, -ctx.pairs :].flip(1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.cat([grad, grad[:, 1 : 1 + ctx.pairs].flip(1)], dim=1)


class _HalfSpectrum(torch.autograd.Function):
    """Its matrix of cosines is symmetric, so the gradient is the same transform; autograd would take a whole complex one."""

    @staticmethod
    def forward(ctx: Any, folded: Tensor, count: int) -> Tensor:
        ctx.count = count
        return torch.fft.rfft(folded, n=count, dim=1).real

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.fft.rfft(grad, n=ctx.count, dim=1).real, None
