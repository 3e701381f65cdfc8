"""Merging the heads of separately trained blocks, tensor by tensor (MM-Lego, arXiv 2405.19950, section 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.errors import UserError
from models.mm_lego.block import Head

HeadMethod = Literal["slerp", "slerp_official", "linear", "ot"]


@torch.no_grad()
def merge_heads(heads: Sequence[Head], method: HeadMethod = "slerp", weights: Sequence[float] | None = None) -> Head:
    """One head from several of equal shape; each parameter is merged as one tensor.

    More than two heads are merged one after the other, each with its share of the weight so far.

    Args:
        heads: of the blocks.
        method: "slerp" interpolates direction and length on the arc between two tensors, and linearly where they are
            parallel, opposite or zero. "slerp_official" does not normalise its first tensor: it ends at the second tensor
            only if both have length 1, and it is NaN for parallel and for zero tensors, such as those of untrained heads.
            "linear" is the mean. "ot" permutes the rows of each tensor to match the first head's before the mean; rows of
            the last layer are classes, so that it may exchange classes.
        weights: share of each head, with sum 1; None gives equal shares. See :func:`official_weights`.
    """
    check_weights(weights, len(heads))
    shares = list(weights) if weights is not None else [1 / len(heads)] * len(heads)
    merged, merge = copy.deepcopy(heads[0]), METHODS[method]
    totals = list(accumulate(shares))
    states = [dict(head.named_parameters()) for head in heads]
    for name, parameter in merged.named_parameters():
        for state, share, total in zip(states[1:], shares[1:], totals[1:], strict=True):
            if state[name].shape != parameter.shape:
                shapes = [tuple(state[name].shape) for state in states]
                raise UserError(
                    f"heads of different shapes cannot be merged: {name} has {shapes}. Give blocks of equal latent_dim."
                )
            parameter.copy_(merge(parameter, state[name], share / total if total else 0.0))
    return merged


def official_weights(method: HeadMethod, alpha: float) -> tuple[float, float]:
    """Shares of two heads for the official ``alpha``: that of the first one in "linear", of the second one otherwise."""
    return (alpha, 1 - alpha) if method == "linear" else (1 - alpha, alpha)


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Raises UserError unless ``weights`` are ``count`` shares with sum 1."""
    if weights is not None and (len(weights) != count or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
        raise UserError(f"weights={list(weights)} must be {count} shares with sum 1, one for each block.")


def linear(a: Tensor, b: Tensor, share: float) -> Tensor:
    return (1 - share) * a + share * b


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    length_a, length_b = a.norm(), b.norm()
    if not (length_a and length_b):
        return linear(a, b, share)
    unit_a, unit_b = a / length_a, b / length_b
    angle = torch.arccos((unit_a * unit_b).sum().clamp(-1, 1))
    if angle.sin() < 1e-6:
        return linear(a, b, share)
    direction = (torch.sin((1 - share) * angle) * unit_a + torch.sin(share * angle) * unit_b) / angle.sin()
    return linear(length_a, length_b, share) * direction


def slerp_official(a: Tensor, b: Tensor, share: float) -> Tensor:
    cosine = ((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1)
    angle = share * torch.arccos(cosine)
    rest = b - cosine * a
    return angle.cos() * a + angle.sin() * rest / rest.norm()


def optimal_transport(a: Tensor, b: Tensor, share: float) -> Tensor:
    # Matchings of numbers on a line are often equally cheap, and then rounding decides. The costs are therefore computed in
    # the order and precision of the official ones, |x|^2 + |y|^2 - 2xy in single precision.
    x, y = (tensor.flatten(1).cpu().numpy() if tensor.ndim > 1 else tensor[:, None].cpu().numpy() for tensor in (a, b))
    squares = -2 * (x @ y.T) + (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None]
    matches = np.argsort(linear_sum_assignment(np.sqrt(np.maximum(squares, 0)).T)[1])
    return linear(a, b[torch.as_tensor(matches, device=b.device)], share)


METHODS: dict[HeadMethod, Callable[[Tensor, Tensor, float], Tensor]] = {
    "slerp": slerp,
    "slerp_official": slerp_official,
    "linear": linear,
    "ot": optimal_transport,
}
