"""The cumulative classifier of FrameExit and AdaFocusV2: a prediction after each glanced moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StepHeads(nn.Module):
    """A linear layer per step as one tensor, so that all steps are one batched product."""

    def __init__(self, steps: int, width: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(steps, num_classes, width))
        self.bias = nn.Parameter(torch.empty(steps, num_classes))
        bound = width**-0.5  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, states: Tensor, first: int = 0) -> Tensor:
        """States (B, n, W) of the steps ``first`` ... to logits (B, n, C)."""
        steps = slice(first, first + states.shape[1])
        return torch.einsum("bkw,kcw->bkc", states, self.weight[steps]) + self.bias[steps]

    def macs(self, states: Tensor, first: int = 0) -> int:
        return states.shape[0] * states.shape[1] * self.weight[0].numel()


class CumulativeClassifier(nn.Module):
    """Features of K moments to K predictions, the k-th from the running maximum over the first k.

    Args:
        in_dim: width of a moment's features.
        num_classes: C.
        steps: the largest K, one linear head each.
        width: of the MLP before the maximum.
        dropout: before each head.
    """

    def __init__(self, in_dim: int, num_classes: int, steps: int, width: int = 4096, dropout: float = 0.2):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, width), nn.BatchNorm1d(width), nn.ReLU())
        self.heads = StepHeads(steps, width, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """(B, K, in_dim) to logits (B, K, C); K may be smaller than the number of steps."""
        states = self.mlp(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return self.heads(self.dropout(states.cummax(dim=1).values))

    def step(self, features: Tensor, number: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One moment (B, in_dim) of evaluation: logits (B, C) of step ``number`` (from 0) and the new running maximum."""
        new = self.mlp(features)
        state = new if state is None else torch.maximum(state, new)
        return self.heads(state[:, None], number)[:, 0], state
