"""Centred kernel alignment between two sets of features of the same samples (arXiv 1905.00414).

Linear CKA is made from feature covariances, O(n d²); no n x n matrix exists. The kernel form is for small n.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_hsic(x: Tensor, y: Tensor) -> Tensor:
    """``<H X Xᵀ H, H Y Yᵀ H>_F`` of features (n, dx) and (n, dy), which is ``|Xcᵀ Yc|²_F`` of the centred features.

    Biased and not divided by (n - 1)², which cancels in CKA.
    """
    return ((x - x.mean(dim=0)).T @ (y - y.mean(dim=0))).square().sum()


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of (n, dx) and (n, dy), in [0, 1]; give float64 where many digits matter."""
    return linear_hsic(x, y) / (linear_hsic(x, x) * linear_hsic(y, y)).sqrt()


def rbf_kernel(x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
    """``exp(-|xi - xj|² / (2 sigma²))`` (n, n); ``sigma`` None is the root of the (lower) median non-zero squared distance."""
    gram = x @ x.T
    own = gram.diagonal()
    squared = (own[None, :] - gram) + (own[:, None] - gram)
    if sigma is None:
        sigma = squared[squared != 0].median().sqrt()
    return torch.exp(-squared / (2 * sigma**2))


def kernel_cka(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - K and L are the field's names
    """CKA of two kernel matrices (n, n)."""
    k, l = _centred(k), _centred(l)  # noqa: E741
    return (k * l).sum() / (k.square().sum() * l.square().sum()).sqrt()


def local_cka(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
    """(q, r): linear CKA of the base pairs (n, dx), (n, dy) with one query pair added, for all q x r query pairs.

    The highest entry of a row is the match of that query among ``query_y`` (freeze-align's training-free retrieval).
    """
    # One sample more is a rank-one change of every covariance, so the base is gone through once.
    n = len(x)
    factor = n / (n + 1)
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    a, b = query_x - x_mean, query_y - y_mean  # (q, dx), (r, dy)
    cross = x.T @ y
    norm_x, norm_y = _grown(x, a, factor), _grown(y, b, factor)
    hsic = cross.square().sum() + 2 * factor * a @ cross @ b.T
    hsic = hsic + factor**2 * a.square().sum(dim=1)[:, None] * b.square().sum(dim=1)[None, :]
    return hsic / (norm_x[:, None] * norm_y[None, :]).sqrt()


def _grown(x: Tensor, a: Tensor, factor: float) -> Tensor:
    """``|XᵀX + factor a aᵀ|²_F`` for each row of ``a``."""
    covariance = x.T @ x
    inner = ((a @ covariance) * a).sum(dim=1)
    return covariance.square().sum() + 2 * factor * inner + factor**2 * a.square().sum(dim=1).square()


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(dim=0, keepdim=True) - kernel.mean(dim=1, keepdim=True) + kernel.mean()
