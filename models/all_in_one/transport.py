"""Optimal transport between word and patch tokens (ViLT's word-patch alignment), by inexact proximal point iterations."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FAR = 1e4  # added to the marginals of padding, which drives its scaling factors to 0


class Transport(NamedTuple):
    """``distance`` (B,), ``cost`` (B, N, M) of text token i and visual token j, ``plan`` (B, M, N), without gradient."""

    distance: Tensor
    cost: Tensor
    plan: Tensor


def word_patch_transport(
    text: Tensor, visual: Tensor, text_valid: Tensor, visual_valid: Tensor, beta: float = 0.5, iterations: int = 50
) -> Transport:
    """Distance of moving a caption's words onto a clip's patches, cost 1 - cosine; gradient through the cost alone.

    Args:
        text: (B, N, D).
        visual: (B, M, D). Computed in float32 whatever they are.
        text_valid: (B, N) bool, the tokens that take part.
        visual_valid: (B, M) bool, likewise.
        beta: weight of the proximal term.
        iterations: of IPOT (Xie et al., arXiv 1802.04307), one inner step each.
    """
    with torch.autocast(text.device.type, enabled=False):
        x, y = (F.normalize(part.float(), dim=-1, eps=1e-5) for part in (text, visual))
        pair_padded = ~(text_valid[:, :, None] & visual_valid[:, None, :])
        cost = (1 - x @ y.transpose(1, 2)).masked_fill(pair_padded, 0)
        with torch.no_grad():
            plan = _ipot(cost, text_valid, visual_valid, pair_padded, beta, iterations)
        return Transport((cost * plan.transpose(1, 2)).sum(dim=(1, 2)), cost, plan)


def _ipot(cost: Tensor, x_valid: Tensor, y_valid: Tensor, pair_padded: Tensor, beta: float, iterations: int) -> Tensor:
    padded = pair_padded.transpose(1, 2)
    kernel = torch.exp(-cost.transpose(1, 2) / beta).masked_fill(padded, 0)
    plan = torch.ones_like(kernel).masked_fill(padded, 0)
    x_count, y_count = x_valid.sum(1)[:, None, None], y_valid.sum(1)[:, None, None]
    x_far, y_far = (~x_valid)[:, None] * _FAR, (~y_valid)[:, :, None] * _FAR
    sigma = (x_valid / x_count[:, 0].clamp(min=1))[:, :, None].to(kernel.dtype)  # (B, N, 1)
    for _ in range(iterations):
        plan = plan.mul_(kernel)
        delta = 1 / (y_count * plan.bmm(sigma) + y_far)  # (B, M, 1)
        sigma = (1 / (x_count * delta.transpose(1, 2).bmm(plan) + x_far)).transpose(1, 2)
        plan.mul_(delta).mul_(sigma.transpose(1, 2))
    return plan.masked_fill_(padded, 0)
