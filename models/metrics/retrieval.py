"""Image-text retrieval by counting ranks tile by tile: exact, and never a one-hot of queries times candidates.

A rank is the number of wrong candidates that score higher than the best right one (0 is best). A wrong candidate with
exactly the same score counts against the query only if it stands earlier in the pool, as a stable sort would have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def retrieval_ranks(image: Tensor, text: Tensor, owner: Tensor, tile: int = 1024) -> tuple[Tensor, Tensor]:
    """Ranks of image-to-text (N,) and text-to-image (M,) retrieval by cosine.

    Args:
        image: embeddings (N, D), normalised here.
        text: embeddings (M, D).
        owner: (M,) int64, the image each text belongs to; every image needs at least one text.
        tile: rows per block; memory is O(tile * max(N, M)).
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    counts = torch.bincount(owner, minlength=len(image))
    if len(counts) > len(image) or (counts == 0).any():
        raise ValueError(f"every text needs an image of the {len(image)} given, and every image a text")
    i2t = torch.cat([_ranks_of_rows(image[a : a + tile] @ text.T, owner, a) for a in range(0, len(image), tile)])
    t2i = torch.cat([_ranks_of_columns(text[a : a + tile] @ image.T, owner[a : a + tile]) for a in range(0, len(text), tile)])
    return i2t, t2i


def _ranks_of_rows(scores: Tensor, owner: Tensor, first: int) -> Tensor:
    right = owner[None, :] == torch.arange(first, first + len(scores), device=scores.device)[:, None]
    best, where = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True)
    earlier = torch.arange(scores.shape[1], device=scores.device)[None, :] < where
    return (((scores > best) | ((scores == best) & earlier)) & ~right).sum(dim=1)


def _ranks_of_columns(scores: Tensor, owner: Tensor) -> Tensor:
    best = scores.gather(1, owner[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device)[None, :] < owner[:, None]
    return ((scores > best) | ((scores == best) & earlier)).sum(dim=1)


def recall_at(ranks: Tensor, k: int) -> float:
    """Share of queries, in percent, whose best right candidate is among the first ``k``."""
    return (ranks < k).double().mean().item() * 100


def chance_recall_at(k: int, pool: int, right: int | Tensor = 1) -> float:
    """Expected recall@k in percent of a random order: 1 - C(pool - right, k) / C(pool, k), averaged over queries."""
    right = torch.as_tensor(right, dtype=torch.float64).reshape(-1)
    miss = torch.ones_like(right)
    for drawn in range(min(k, pool)):
        miss *= ((pool - right - drawn) / (pool - drawn)).clamp(min=0)
    return (1 - miss).mean().item() * 100


def validation_retrieval(image: Tensor, text: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """SAIL's in-training validator on one-to-one pairs (N, D): recall (percent), ranks from 1, accuracy of cosine signs.

    ``positive_accuracy`` is the share of pairs with a cosine above 0, ``negative_accuracy`` of non-pairs below 0.
    """
    pairs = torch.arange(len(image), device=image.device)
    i2t, t2i = retrieval_ranks(image, text, pairs)
    metrics: dict[str, float] = {}
    for name, ranks in (("i2t", i2t), ("t2i", t2i)):
        metrics |= {f"{name}_recall@{k}": recall_at(ranks, k) for k in ks}
        metrics[f"{name}_mean_rank"] = ranks.double().mean().item() + 1
        # The official median is the floor of NumPy's, which averages the two middle ranks.
        metrics[f"{name}_median_rank"] = float(torch.floor(torch.quantile(ranks.double(), 0.5))) + 1
    metrics["mean_recall"] = sum(metrics[f"{n}_recall@{k}"] for n in ("i2t", "t2i") for k in ks) / (2 * len(ks))
    metrics |= _sign_accuracies(F.normalize(image, dim=-1), F.normalize(text, dim=-1))
    return metrics


def _sign_accuracies(image: Tensor, text: Tensor, tile: int = 1024) -> dict[str, float]:
    diagonal = (image * text).sum(dim=-1)
    negative = sum(int((image[a : a + tile] @ text.T < 0).sum()) for a in range(0, len(image), tile))
    others = max(len(image) * (len(image) - 1), 1)
    return {
        "positive_accuracy": (diagonal > 0).double().mean().item(),
        "negative_accuracy": (negative - int((diagonal < 0).sum())) / others,
    }
