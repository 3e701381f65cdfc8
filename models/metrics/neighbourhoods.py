"""How alike two sets of features are, by the neighbours of each sample, for every pair of layers of two encoders.

Neighbours are found once per layer, tile by tile (the n x n similarities are never whole); a pair of layers then costs
n x k. Linear CKA of a pair is made from covariances; only the two metrics over hops hold n x n matrices. (STRUCTURE, arXiv
2506.16895, section 3.1; Platonic representations, arXiv 2405.07987.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.metrics.cka import cka
from models.sizes import NEIGHBOURS

Metric = Literal["mutual_knn", "cka", "unbiased_cka", "cycle_knn", "cknna", "svcca", "lcs_knn", "hcs", "l_hop_cka"]
METRICS: tuple[Metric, ...] = get_args(Metric)


def neighbour_count(rule: int | Literal["rice", "sqrt", "sturges"], samples: int) -> int:
    """k for ``samples`` by a rule (official: rice, ``ceil(2 n^(1/3))``) or as given; less than ``samples``."""
    rules = {
        "rice": lambda n: math.ceil(2 * n ** (1 / 3)),
        "sqrt": lambda n: math.ceil(math.sqrt(n)),
        "sturges": lambda n: math.ceil(math.log2(n) + 1),
    }
    k = rules[rule](samples) if isinstance(rule, str) else rule
    if not 0 < k < samples:
        raise ValueError(f"{k} neighbours among {samples} samples: there must be at least 1 and fewer than samples")
    return k


def nearest_neighbours(x: Tensor, k: int, tile_entries: int | None = None) -> Tensor:
    """(n, k) int64: rows with the largest inner product with each row of ``x`` (n, D), without itself, best first."""
    neighbours = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    step = max(1, (tile_entries or NEIGHBOURS.entries(x.device)) // len(x))
    for first in range(0, len(x), step):
        scores = x[first : first + step] @ x.T
        scores.diagonal(first).fill_(-1e8)
        neighbours[first : first + step] = scores.topk(k, dim=1).indices
    return neighbours


def mutual_knn(a: Tensor, b: Tensor) -> float:
    """Mean share of common entries of the neighbour lists (n, k) of the same samples."""
    common = _membership(a).gather(1, b) if len(a) <= 4096 else (a[:, :, None] == b[:, None, :]).any(dim=1)
    return common.double().mean().item()


def cycle_knn(a: Tensor, b: Tensor) -> float:
    """Share of samples that are a neighbour in ``a`` (n, k) of one of their neighbours in ``b`` (n, k)."""
    samples = torch.arange(len(a), device=a.device)[:, None]
    return (a[b].flatten(1) == samples).any(dim=1).double().mean().item()


def cknna(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    """CKA of features (n, D) restricted to mutual neighbours, of the lists ``a``, ``b`` (n, k >= 2) (arXiv 2405.07987)."""
    both = (a[:, :, None] == b[:, None, :]).any(dim=2)
    cross = _sparse_hsic(x, y, a, both)
    self_hsic = [_sparse_hsic(f, f, lists, torch.ones_like(lists, dtype=torch.bool)) for f, lists in ((x, a), (y, b))]
    return (cross / ((self_hsic[0] * self_hsic[1]).sqrt() + 1e-6)).item()


def lcs_knn(a: Tensor, b: Tensor) -> float:
    """Mean length of the longest common subsequence of the neighbour lists (n, k) of the same samples, between 0 and k.

    Unlike :func:`mutual_knn` it wants common neighbours in the same order (Platonic representations' code).
    """
    n, k = a.shape
    above = a.new_zeros(n, k + 1)  # lengths for the first i entries of a and the first j of b
    for i in range(k):
        row = a.new_zeros(n, k + 1)
        grown = torch.where(a[:, i, None] == b, above[:, :-1] + 1, above[:, 1:])
        row[:, 1:] = grown.cummax(dim=1).values  # the maximum over all shorter beginnings of b
        above = row
    return above[:, -1].double().mean().item()


def svcca(x: Tensor, y: Tensor, dim: int = 10) -> float:
    """Mean canonical correlation of the ``dim`` leading principal components of standardised features (n, dx), (n, dy)
    (Platonic representations' code; arXiv 1706.05806). In closed form, where that code iterates."""
    return _mean_correlation(leading_components(x, dim), leading_components(y, dim))


def leading_components(x: Tensor, dim: int = 10) -> Tensor:
    """(n, dim) float64 orthonormal: left singular vectors of the standardised features (n, D), without those of no variance."""
    x = x.double()
    x = x - x.mean(dim=0)
    vectors, values, _ = torch.linalg.svd(x / (x.std(dim=0) + 1e-8), full_matrices=False)
    return vectors[:, :dim][:, values[:dim] > 1e-9 * values[0]]


def _mean_correlation(a: Tensor, b: Tensor) -> float:
    return torch.linalg.svdvals(a.T @ b).mean().item()


def hop_similarity(x: Tensor, y: Tensor, levels: int = 3, temperature: float = 0.05) -> float:
    """``exp(-D)`` of the multi-hop divergence of two sets of features (n, D) (STRUCTURE's ``hcs``).

    Unlike the regulariser it sums over all entries, and centres unit-length rows by the mean of the raw features, as the
    official code does.
    """
    total = 0.0
    for level, (p, q) in enumerate(_hops(x, y, levels, temperature), start=1):
        middle = (p + q) / 2 + 1e-8
        total += float(0.5 * (torch.special.xlogy(q, q / middle).sum() + torch.special.xlogy(p, p / middle).sum())) / level
    return math.exp(-total / levels)


def hop_cka(x: Tensor, y: Tensor, levels: int = 3, temperature: float = 0.05) -> float:
    """Mean over the hops of the CKA between the rows of the random walks' powers, for features (n, D).

    STRUCTURE's code has a metric ``l_hop_cka`` whose definition is not published: this is our reading.
    """
    return sum(cka(p, q) for p, q in _hops(x, y, levels, temperature)) / levels


def _hops(x: Tensor, y: Tensor, levels: int, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The walks over the samples of both sets (n, n), and their powers up to ``levels``."""
    walks = []
    for features in (x, y):
        z = features / (features.norm(dim=1, keepdim=True) + 1e-8) - features.mean(dim=0)
        walks.append((z @ z.T / temperature).softmax(dim=1))
    p, q = walks
    yield p, q
    for _ in range(1, levels):
        p, q = p @ walks[0], q @ walks[1]
        yield p, q


class LayerPairs:
    """Scores of all pairs of the layers of two encoders on the same samples.

    Args:
        vision: pooled features (n, layers, D), or a list of (n, D).
        text: likewise, of the same samples.
        k: neighbours, see :func:`neighbour_count`.
        normalise: rows to unit length first (official).
    """

    def __init__(
        self,
        vision: Tensor | list[Tensor],
        text: Tensor | list[Tensor],
        k: int | Literal["rice", "sqrt", "sturges"] = "rice",
        normalise: bool = True,
    ):
        self.sides = [
            [F.normalize(layer.float(), dim=-1) if normalise else layer.float() for layer in _layers(side)]
            for side in (vision, text)
        ]
        self.k = neighbour_count(k, len(self.sides[0][0]))
        self._lists: list[list[Tensor]] | None = None
        self._components: list[list[Tensor]] | None = None

    @property
    def neighbours(self) -> list[list[Tensor]]:
        """Neighbour lists (n, k) of each layer of each side, made once."""
        if self._lists is None:
            self._lists = [[nearest_neighbours(layer, self.k) for layer in side] for side in self.sides]
        return self._lists

    @property
    def components(self) -> list[list[Tensor]]:
        """Leading principal components of each layer of each side, made once."""
        if self._components is None:
            self._components = [[leading_components(layer) for layer in side] for side in self.sides]
        return self._components

    def scores(self, metric: Metric = "mutual_knn") -> Tensor:
        """(vision layers, text layers) float32. Raises ValueError for an unknown metric."""
        if metric not in METRICS:
            raise ValueError(f"unknown metric '{metric}'; choose of {', '.join(METRICS)}")
        rows = range(len(self.sides[0])), range(len(self.sides[1]))
        return torch.tensor([[self._score(metric, i, j) for j in rows[1]] for i in rows[0]])

    def _score(self, metric: Metric, i: int, j: int) -> float:
        x, y = self.sides[0][i], self.sides[1][j]
        if metric in ("cka", "unbiased_cka"):
            return cka(x, y, unbiased=metric == "unbiased_cka")
        if metric == "svcca":
            return _mean_correlation(self.components[0][i], self.components[1][j])
        if metric in ("hcs", "l_hop_cka"):
            return (hop_similarity if metric == "hcs" else hop_cka)(x, y)
        a, b = self.neighbours[0][i], self.neighbours[1][j]
        if metric == "cknna":
            return cknna(x.double(), y.double(), a, b)
        return {"mutual_knn": mutual_knn, "cycle_knn": cycle_knn, "lcs_knn": lcs_knn}[metric](a, b)


def best_pair(scores: Tensor) -> tuple[int, int]:
    """(row, column) of the largest entry, the first one of equals."""
    return divmod(int(scores.argmax()), scores.shape[1])


def _layers(side: Tensor | list[Tensor]) -> list[Tensor]:
    return list(side.unbind(dim=1)) if isinstance(side, Tensor) else side


def _membership(lists: Tensor) -> Tensor:
    inside = torch.zeros(len(lists), len(lists), dtype=torch.bool, device=lists.device)
    return inside.scatter_(1, lists, True)


def _sparse_hsic(x: Tensor, y: Tensor, lists: Tensor, used: Tensor) -> Tensor:
    """:func:`~models.metrics.cka.unbiased_hsic` of kernels that are kept only at the entries (i, lists[i]) where ``used``.

    Args:
        x: (n, dx) features.
        y: (n, dy) features.
        lists: (n, k) columns.
        used: (n, k) bool.
    """
    n, k = lists.shape
    rows = torch.arange(n, device=x.device)[:, None].expand(n, k)[used]
    columns = lists[used]
    of_x, of_y = (x[rows] * x[columns]).sum(dim=1), (y[rows] * y[columns]).sum(dim=1)
    # sum_ij K_ij L_ji: entries whose mirror image is kept too; the kernels themselves are symmetric
    place = rows * n + columns
    mirrored = torch.isin(columns * n + rows, place)
    trace = (of_x * of_y)[mirrored].sum()
    column_x = x.new_zeros(n).index_add_(0, columns, of_x)
    row_y = y.new_zeros(n).index_add_(0, rows, of_y)
    whole = of_x.sum() * of_y.sum() / ((n - 1) * (n - 2))
    return (trace + whole - 2 / (n - 2) * (column_x * row_y).sum()) / (n * (n - 3))
