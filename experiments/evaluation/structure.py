"""The evaluations of STRUCTURE (arXiv 2506.16895): retrieval among rows that repeat their image, and neighbourhoods of the
frozen features that the maps keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from models.metrics.embedding_quality import trustworthiness
from models.metrics.retrieval import chance_recall_at, grouped_retrieval

_NAMES = {"R": "recall", "P": "precision", "MAP": "map"}


def row_retrieval(split: EmbeddedSplit, ks: Sequence[int] = (1, 5, 10)) -> SuiteResult:
    """Recall, precision and mean average precision at ``ks`` (percent) by the official protocol, for comparison with the
    paper's tables: one row for each caption, with its image, on both sides.

    An image with five captions stands among the candidates five times, so that text-to-image R@5 behaves like R@1 of the
    suite ``retrieval``, which counts every image once.
    """
    by_rows = grouped_retrieval(split.image[split.owner], split.text, split.owner, ks)
    right, rows = torch.bincount(split.owner)[split.owner], len(split.owner)
    metrics: dict[str, float] = {}
    chance: dict[str, float] = {}
    for key, value in by_rows.items():
        direction, _, measure = key.partition(".")
        kind, _, k = measure.partition("@")
        name = f"row_retrieval/{direction}_{_NAMES[kind]}@{k}"
        metrics[name] = value
        if kind == "R":
            chance[name] = chance_recall_at(int(k), rows, right)
        elif kind == "P":
            chance[name] = right.double().mean().item() / rows * 100
    return SuiteResult(metrics, {"chance": chance}, dict(split.hashes))


def neighbourhoods(split: EmbeddedSplit, k: int = 10, samples: int = 5000, seed: int = 42) -> SuiteResult:
    """Trustworthiness and continuity (percent, 100 is best) of the embeddings with regard to the frozen features, of images
    and of texts: whether neighbours by cosine after the map were neighbours before, and the reverse.

    Beside them stands a random linear map to as many dimensions, which knows nothing of the other modality.

    Args:
        k: neighbours. samples: at most so many of each side, drawn by ``seed``.
    """
    if split.frozen is None:
        return SuiteResult(notes=["neighbourhoods left out: there is not one frozen vector for each image and text."])
    metrics: dict[str, float] = {}
    random: dict[str, float] = {}
    for name, frozen, embedded in zip(("image", "text"), split.frozen(), (split.image, split.text), strict=True):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(frozen), generator=generator)[:samples]
        before, after = F.normalize(frozen[rows].float(), dim=-1), F.normalize(embedded[rows].float(), dim=-1)
        untrained = F.normalize(before @ torch.randn(before.shape[1], after.shape[1], generator=generator), dim=-1)
        metrics |= _kept(name, before, after, k)
        random |= _kept(name, before, untrained, k)
    return SuiteResult(metrics, {"random map": random}, dict(split.hashes))


def _kept(name: str, before: Tensor, after: Tensor, k: int) -> dict[str, float]:
    k = min(k, (len(before) - 1) // 2)  # more have no meaning
    return {
        f"neighbourhoods/{name}_trustworthiness": 100 * trustworthiness(before, after, k),
        f"neighbourhoods/{name}_continuity": 100 * trustworthiness(after, before, k),
    }
