"""Alignment probing: how well two frozen feature spaces can be aligned by linear maps, judged on held-out pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from models.metrics.retrieval import recall_at, retrieval_ranks


class AlignmentProbe:
    """Scores all pairs of layers by the retrieval that a closed-form linear alignment reaches on held-out pairs.

    SAIL trains its linear probe by gradient (arXiv 2412.04616, section 3.1). Here each layer is reduced to its principal
    components and whitened, once, and a pair costs one small singular value decomposition: canonical correlations, which
    need no learning rate, so that every pair of layers can be probed.

    Args:
        vision: list of layers (n, D) of the samples in random order; the last ones are held out.
        text: list of layers (n, D) of the same samples.
        held_out: their share.
        components: principal components kept of a layer.
        dim: directions kept of a pair.
        shrinkage: share of the mean variance of the components added to each: with few pairs the plain solution fits noise.
    """

    def __init__(
        self,
        vision: list[Tensor],
        text: list[Tensor],
        held_out: float = 0.25,
        components: int = 128,
        dim: int = 64,
        shrinkage: float = 0.01,
    ):
        self.dim, self.train = dim, round(len(vision[0]) * (1 - held_out))
        self.sides = [[self._whitened(layer, components, shrinkage) for layer in side] for side in (vision, text)]

    def scores(self, k: int = 5) -> Tensor:
        """(vision layers, text layers): mean recall@``k`` of both directions, in percent."""
        return torch.tensor([[self._score(a, b, k) for b in self.sides[1]] for a in self.sides[0]])

    def _score(self, a: Tensor, b: Tensor, k: int) -> float:
        left, _, right = torch.linalg.svd(a[: self.train].T @ b[: self.train], full_matrices=False)
        image, text = a[self.train :] @ left[:, : self.dim], b[self.train :] @ right[: self.dim].T
        ranks = retrieval_ranks(image, text, torch.arange(len(image)))
        return sum(recall_at(direction, k) for direction in ranks) / 2

    def _whitened(self, layer: Tensor, components: int, shrinkage: float) -> Tensor:
        """(n, at most components); a layer that is the same for every sample becomes zeros, which retrieve nothing."""
        x = layer.double() - layer[: self.train].double().mean(dim=0)
        _, singular, directions = torch.linalg.svd(x[: self.train], full_matrices=False)
        leading = slice(0, min(components, len(singular)))
        variance = singular[leading].square()
        scale = variance + shrinkage * variance.mean()
        return (x @ directions[leading].T) / scale.sqrt() if float(variance[0]) > 1e-12 else torch.zeros_like(x[:, :1])
