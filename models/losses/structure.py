"""STRUCTURE's regulariser: the aligned batch keeps the multi-hop neighbourhoods of the frozen one (arXiv 2506.16895).

Similarities of a batch become a random walk over its samples, ``P = softmax(Z Zᵀ / t)``; its powers are the hops. The
walks of the frozen and of the aligned features are compared at every level by a Jensen-Shannon divergence.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sizes import WALKS

Divergence = Literal["js", "reversed"]
EPS = 1e-12


def structure_loss(
    original: Tensor,
    aligned: Tensor,
    levels: int = 3,
    temperature: float = 0.1,
    weighting: Literal["none", "inverse"] = "inverse",
    divergence: Divergence = "js",
    distance: Literal["cosine", "rbf", "spearman"] = "cosine",
    centring: Literal["mean", "standard", "none"] = "mean",
    center_first: bool = False,
    gamma: float = 1.0,
    margin: float = 0.0,
) -> Tensor:
    """``(1/L) sum_l w_l max(D(P^l, Q^l) - margin, 0)`` of frozen (N, Dx) and aligned (N, Da) features of the same samples.

    The frozen side has no graph; powers are carried from level to level; the gradient is made in the forward pass, so that
    a single N x N matrix waits for the backward pass.

    Args:
        levels: L, the hops that are compared.
        temperature: of the cosine and spearman similarities.
        weighting: 'inverse' weighs level l by 1/l.
        divergence: 'js' is the paper's, ``(KL(P|M) + KL(Q|M)) / 2``; 'reversed' is what the official code computes,
            ``(KL(M|P) + KL(M|Q)) / 2``: the same minimiser, other values and gradients.
        distance: 'rbf' is ``exp(-gamma |zi - zj|²)``; 'spearman' compares ranks and gives no gradient (an ablation).
        centring: by the batch mean, after normalising the rows or, with ``center_first``, before; 'standard' also
            divides by the deviation.
        margin: what a level may differ for free.
    """
    device = aligned.device.type
    with torch.autocast(device, enabled=False):
        with torch.no_grad():
            of_original = _similarity(_prepared(original, centring, center_first), distance, temperature, gamma)
        of_aligned = _similarity(_prepared(aligned, centring, center_first), distance, temperature, gamma)
        weights = tuple((1 / level if weighting == "inverse" else 1.0) / levels for level in range(1, levels + 1))
        return _Walks.apply(of_original, of_aligned, weights, divergence, margin)


def _prepared(x: Tensor, centring: str, center_first: bool) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    if not center_first:
        x = F.normalize(x, dim=-1)
    if centring != "none":
        deviation = x.std(dim=0) if centring == "standard" else None
        x = x - x.mean(dim=0)
        x = x if deviation is None else x / deviation
    return F.normalize(x, dim=-1) if center_first else x


def _similarity(z: Tensor, distance: str, temperature: float, gamma: float) -> Tensor:
    if distance == "rbf":
        squares = z.square().sum(dim=1)
        return torch.exp(-gamma * (squares[:, None] + squares[None, :] - 2 * z @ z.T).clamp(min=0))
    if distance == "spearman":
        z = F.normalize(z.argsort(dim=1).argsort(dim=1).to(z.dtype), dim=-1)
    return (z / temperature) @ z.T


class _Walks(torch.autograd.Function):
    """Weighted divergences of all levels. With G_l the derivative by Q^l, the derivative by Q follows from the recurrence
    ``A_l = G_l + A_{l+1} Qᵀ`` as ``A_1 + sum_l (Q^l)ᵀ A_{l+1}``: two products per level beyond the first."""

    @staticmethod
    def forward(
        ctx: Any, of_original: Tensor, of_aligned: Tensor, weights: list[float], divergence: Divergence, margin: float
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[1]
        p, q = of_original.softmax(dim=1), of_aligned.softmax(dim=1)
        p_power, q_powers = p, [q]
        value, gradients = q.new_zeros(()), []
        for level, weight in enumerate(weights, start=1):
            if level > 1:
                p_power, last = p_power @ p, q_powers[-1] @ q
                q_powers.append(last)
            divergence_here, gradient = _divergence(p_power, q_powers[-1], divergence, wants_gradient)
            outside = float(divergence_here) > margin if margin else True
            if outside:
                value += weight * (divergence_here - margin)
            if wants_gradient:
                gradients.append(gradient.mul_(weight * outside))
            else:
                del q_powers[:-1]
                q_powers = [q_powers[-1]]
        if wants_gradient:
            del p, p_power
            gradient = _through_powers(q_powers, gradients)
            ctx.save_for_backward(gradient.sub_((gradient * q).sum(dim=1, keepdim=True)).mul_(q))  # through the softmax
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return None, grad * saved, None, None, None


def _through_powers(powers: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Derivative by Q, from those by Q, Q², ... (destroyed on the way)."""
    q, carried, total = powers[0], gradients.pop(), None
    while gradients:
        power = powers[len(gradients) - 1]
        total = power.T @ carried if total is None else total.addmm_(power.T, carried)
        carried = gradients.pop().addmm_(carried, q.T)
    return carried if total is None else total.add_(carried)


def _divergence(p: Tensor, q: Tensor, kind: Divergence, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Mean over rows of the divergence of two row-stochastic (N, N), and its derivative by ``q``; block by block."""
    size = len(p)
    gradient = torch.empty_like(q) if wants_gradient else None
    total = q.new_zeros((), dtype=torch.float64)
    step = WALKS.rows(q.device, size)
    for first in range(0, size, step):
        rows = slice(first, first + step)
        a, b = p[rows], q[rows]
        middle = a + b
        middle.mul_(0.5).add_(EPS)
        log_middle = middle.log()
        log_a, log_b = (a + EPS).log_(), (b + EPS).log_()
        if kind == "reversed":
            difference = (log_a.add_(log_b)).mul_(-0.5).add_(log_middle)  # log M - (log P + log Q) / 2
            total += (middle * difference).sum(dtype=torch.float64)
            if wants_gradient:
                # d/dQ of M (log M - (log P + log Q) / 2), with dM/dQ = 1/2
                difference.add_(1).mul_(0.5).sub_(middle.div_(b + EPS), alpha=0.5)
                gradient[rows] = difference.div_(size)
        else:
            log_a.sub_(log_middle)
            log_b.sub_(log_middle)
            total += 0.5 * ((a * log_a).sum(dtype=torch.float64) + (b * log_b).sum(dtype=torch.float64))
            if wants_gradient:
                gradient[rows] = log_b.mul_(0.5 / size)
    return (total / size).to(q.dtype), gradient


class RegulariserOutput(NamedTuple):
    """The weighted ``loss`` that enters the sum, and what is only reported."""

    loss: Tensor
    report: dict[str, Tensor]


class StructureRegulariser(nn.Module):
    """The regulariser of both modalities, with its weight's warm-up (arXiv 2506.16895, section 3).

    Args:
        weight: lambda (official: 10).
        warmup_steps: optimiser steps over which lambda grows from 0 (official: 1000).
        reduction: of the two modalities: 'mean' is the official code's, 'sum' the paper's.
        validation_weight: 'full' judges every epoch at the full lambda; with 'current', as in the official code, early
            epochs, whose lambda is still small, look better than they are to whoever picks the best one.
        extra: what samples that it alone sees are to the batch: they join it ('concatenate'), or stand in its place
            ('replace'; official: ``structure_use_only_unimodal``).
        levels, temperature, weighting, divergence, distance, centring, center_first, gamma, margin: see
            :func:`structure_loss`.
    """

    def __init__(
        self,
        weight: float = 10.0,
        warmup_steps: int = 1000,
        reduction: Literal["mean", "sum"] = "mean",
        validation_weight: Literal["full", "current"] = "full",
        extra: Literal["concatenate", "replace"] = "concatenate",
        levels: int = 1,
        temperature: float = 0.05,
        weighting: Literal["none", "inverse"] = "inverse",
        divergence: Divergence = "js",
        distance: Literal["cosine", "rbf", "spearman"] = "cosine",
        centring: Literal["mean", "standard", "none"] = "mean",
        center_first: bool = False,
        gamma: float = 1.0,
        margin: float = 0.0,
    ):
        super().__init__()
        self.weight, self.warmup_steps, self.reduction = weight, warmup_steps, reduction
        self.validation_weight, self.extra = validation_weight, extra
        self.options: dict[str, Any] = {
            "levels": levels, "temperature": temperature, "weighting": weighting, "divergence": divergence,
            "distance": distance, "centring": centring, "center_first": center_first, "gamma": gamma, "margin": margin,
        }  # fmt: skip

    def weight_at(self, step: int) -> float:
        """Lambda after ``step`` optimiser steps."""
        return self.weight * (min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    def with_extra(self, pair: tuple[Tensor, Tensor], extra: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Frozen and aligned features of a batch, (B, Dx) and (B, Da), with those of further samples."""
        if self.extra == "replace":
            return extra
        # Rows of unlike lengths would count unlike where they are centred before they are normalised.
        aligned = torch.cat([F.normalize(side[1].float(), dim=-1) for side in (pair, extra)])
        return torch.cat([pair[0], extra[0].to(pair[0].dtype)]), aligned

    def forward(self, pairs: list[tuple[Tensor, Tensor]], step: int) -> RegulariserOutput | None:
        """``pairs`` of frozen and aligned features, one per modality; None where lambda is 0 and nothing is computed."""
        ramps = self.training or self.validation_weight == "current"
        weight = self.weight_at(step) if ramps else self.weight
        if weight == 0:
            return None
        values = torch.stack([structure_loss(frozen, aligned, **self.options) for frozen, aligned in pairs])
        value = values.mean() if self.reduction == "mean" else values.sum()
        return RegulariserOutput(weight * value, {"structure": value.detach(), "structure_weight": value.new_tensor(weight)})
