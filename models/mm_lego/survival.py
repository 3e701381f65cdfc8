"""Discrete-time survival: hazards per bin of time, their likelihood with censoring, and the bins (MM-Lego, MCAT).

Shapes: N patients, C bins of time. ``censored`` is True for patients who left before the event.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from models.errors import UserError
from models.sharded import sum_of


def survival_curve(logits: Tensor) -> Tensor:
    """(N, C) probabilities to survive each bin: the running product of ``1 - sigmoid(logits)``."""
    return torch.sigmoid(-logits).cumprod(dim=1)


def risk(logits: Tensor) -> Tensor:
    """(N,) minus the sum of the survival curve: larger for patients who are expected to have the event sooner."""
    return -survival_curve(logits).sum(dim=1)


def survival_nll(
    logits: Tensor,
    bins: Tensor,
    censored: Tensor,
    alpha: float = 0.4,
    class_weights: Tensor | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """Negative log-likelihood of the bins, scalar.

    Args:
        logits: (N, C) of the hazards.
        bins: (N,) bin of the event, or of the last visit of a censored patient.
        censored: (N,) bool or 0 and 1.
        alpha: how much the censored patients' term is left out; officially 0.4.
        class_weights: (C,) weight of the patients of each bin, rescaled to the sum 1. The part of the loss that ``alpha``
            adds is not weighted (official).
        eps: lower bound of each probability.
    """
    hazards = torch.sigmoid(logits)
    curve = torch.cat([torch.ones_like(hazards[:, :1]), survival_curve(logits)], dim=1)
    censored = censored.to(hazards.dtype)
    before, after = (curve.gather(1, bins[:, None] + i)[:, 0].clamp_min(eps).log() for i in (0, 1))
    hazard = hazards.gather(1, bins[:, None])[:, 0].clamp_min(eps).log()
    event_term = -(1 - censored) * (before + hazard)
    total = event_term - censored * after
    if class_weights is not None:
        total = total * (class_weights / class_weights.sum())[bins]
    return ((1 - alpha) * total + alpha * event_term).mean()


def survival_bins(months: Tensor, censored: Tensor, count: int = 4) -> tuple[Tensor, Tensor]:
    """Bins (N,) of survival times at the quantiles of the uncensored ones, and their edges (count + 1,).

    The outer edges are moved just beyond all patients. Raises UserError where two quantiles are equal.
    """
    months = months.double()
    steps = torch.linspace(0, 1, count + 1, dtype=torch.float64, device=months.device)
    edges = torch.quantile(months[~censored.bool()], steps)
    edges[0], edges[-1] = months.min() - 1e-6, months.max() + 1e-6
    if not bool((edges.diff() > 0).all()):
        raise UserError(f"survival times have no {count} different quantiles ({edges.tolist()}): ask for fewer bins.")
    return torch.bucketize(months, edges, right=True) - 1, edges


def class_weights(labels: Tensor, num_classes: int, kind: Literal["inverse", "inverse_root"]) -> Tensor:
    """(C,) weights ``1 / n`` or ``1 / sqrt(n)`` of the classes' counts n. Raises UserError for a class without samples."""
    counts = torch.bincount(labels, minlength=num_classes).float()
    if not bool(counts.all()):
        raise UserError(f"classes {(counts == 0).nonzero().flatten().tolist()} have no samples: use no class weights.")
    return counts.reciprocal() if kind == "inverse" else counts.rsqrt()


def l1_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """Sum of the absolute values of all parameters, scalar."""
    return torch.stack([sum_of(parameter.abs()) for parameter in parameters]).sum()
