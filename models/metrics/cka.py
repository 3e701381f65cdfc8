"""Linear centred kernel alignment of two sets of features of the same samples (arXiv 1905.00414).

Made from feature covariances, O(n d²); no n x n matrix exists.
"""

from __future__ import annotations

from torch import Tensor


def cka(x: Tensor, y: Tensor, unbiased: bool = False) -> float:
    """Linear CKA of features (n, dx), (n, dy) with 1e-6 in the denominator (Platonic representations' code), in float64."""
    hsic = unbiased_hsic if unbiased else linear_hsic
    x, y = x.double(), y.double()
    return (hsic(x, y) / ((hsic(x, x) * hsic(y, y)).sqrt() + 1e-6)).item()


def linear_hsic(x: Tensor, y: Tensor) -> Tensor:
    """``<H X Xᵀ H, H Y Yᵀ H>_F`` of features (n, dx) and (n, dy), which is ``|Xcᵀ Yc|²_F`` of the centred features.

    Biased and not divided by (n - 1)², which cancels in CKA.
    """
    return ((x - x.mean(dim=0)).T @ (y - y.mean(dim=0))).square().sum()


def unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """Song et al.'s estimator of kernels XXᵀ and YYᵀ with zeroed diagonals, from the features alone."""
    n = len(x)
    own_x, own_y = x.square().sum(dim=1), y.square().sum(dim=1)
    sum_x, sum_y = x.sum(dim=0), y.sum(dim=0)
    row_x, row_y = x @ sum_x - own_x, y @ sum_y - own_y  # row sums of the kernels without their diagonals
    trace = (x.T @ y).square().sum() - (own_x * own_y).sum()
    whole = row_x.sum() * row_y.sum() / ((n - 1) * (n - 2))
    return (trace + whole - 2 / (n - 2) * (row_x * row_y).sum()) / (n * (n - 3))
