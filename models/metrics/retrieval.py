"""Image-text retrieval by counting ranks tile by tile: exact, and never a one-hot of queries times candidates.

A rank is the number of wrong candidates that score higher than the best right one (0 is best). A wrong candidate with
exactly the same score counts against the query only if it stands earlier in the pool, as a stable sort would have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sizes import FLAGS, NEIGHBOURS, SCORES


@torch.no_grad()
def retrieval_ranks(image: Tensor, text: Tensor, owner: Tensor, tile_entries: int | None = None) -> tuple[Tensor, Tensor]:
    """Ranks of image-to-text (N,) and text-to-image (M,) retrieval by cosine.

    Args:
        image: embeddings (N, D), of any length.
        text: embeddings (M, D).
        owner: (M,) int64, the image each text belongs to; every image needs at least one text.
        tile_entries: how many scores are held at once; None: as suits the device.

    A query or right candidate that is not finite ranks last: a diverged model must not look perfect. Raises ValueError
    for texts without image or images without text.
    """
    counts = torch.bincount(owner, minlength=len(image))
    if len(owner) != len(text) or len(counts) > len(image) or bool((counts == 0).any()):
        raise ValueError(f"each of the {len(text)} texts needs one of the {len(image)} images, and every image a text")
    tile_entries = tile_entries or SCORES.entries(image.device)
    i2t = _ranks(image, text, _texts_of_images(owner, counts), tile_entries)
    return i2t, _ranks(text, image, owner[:, None], tile_entries)


def _texts_of_images(owner: Tensor, counts: Tensor) -> Tensor:
    """(N, most texts of an image): the texts of each image in order, short rows filled with their first."""
    texts = torch.argsort(owner, stable=True)
    first = counts.cumsum(0) - counts
    column = torch.arange(int(counts.max()), device=owner.device)[None, :]
    return texts[first[:, None] + torch.where(column < counts[:, None], column, 0)]


def _ranks(queries: Tensor, pool: Tensor, right: Tensor, tile_entries: int) -> Tensor:
    """Rank of the best of the ``right`` candidates (Q, R) of each query (Q, D) in ``pool`` (P, D), as int64 (Q,).

    Scores are the cosines times the length of the query, which orders its candidates alike: no normalised copy is made.
    """
    rows = max(1, tile_entries // len(pool))
    lengths = torch.linalg.vector_norm(pool, dim=1).clamp_(min=1e-12).reciprocal_()
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    scores_tile = queries.new_empty(min(rows, len(queries)), len(pool))
    # Of scores' type: counting booleans takes three times as long.
    flag_rows = FLAGS.rows(queries.device, len(pool))
    flags_tile = queries.new_empty(min(flag_rows, len(scores_tile)), len(pool))
    exact = None if len(pool) < 2**24 else torch.float64

    def count(compare: Callable, scores: Tensor, best: Tensor) -> Tensor:
        parts = []
        for part, limit in zip(scores.split(flag_rows), best.split(flag_rows), strict=True):
            parts.append(compare(part, limit, out=flags_tile[: len(part)]).sum(dim=1, dtype=exact))
        return torch.cat(parts).long()

    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        scores = scores_tile[: len(block)]
        torch.mm(block, pool.T, out=scores)
        scores.mul_(lengths)
        matches = right[start : start + rows]
        match_scores = scores.gather(1, matches)
        best = match_scores.amax(dim=1, keepdim=True)
        higher, not_lower = count(torch.gt, scores, best), count(torch.ge, scores, best)
        # Ties are rare; the winner itself is one that is not lower.
        for row in torch.nonzero(not_lower - higher > 1).flatten().tolist():
            first = matches[row][match_scores[row] == best[row]].min()
            higher[row] += torch.count_nonzero(scores[row, :first] == best[row])
        ranks[start : start + rows] = torch.where(best[:, 0].isnan(), len(pool) - 1, higher)
    return ranks


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


def retrieval_metrics(image: Tensor, text: Tensor, owner: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at ``ks`` in percent, mean and median rank from 1, both ways, and ``mean_recall``; see :func:`retrieval_ranks`."""
    return metrics_of_ranks(*retrieval_ranks(image, text, owner), ks)


def metrics_of_ranks(i2t: Tensor, t2i: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The metrics of :func:`retrieval_metrics` of ranks (N,) and (M,) from 0."""
    metrics: dict[str, float] = {}
    for name, ranks in (("i2t", i2t), ("t2i", t2i)):
        metrics |= {f"{name}_recall@{k}": recall_at(ranks, k) for k in ks}
        metrics[f"{name}_mean_rank"] = ranks.double().mean().item() + 1
        # The official median is the floor of NumPy's, which averages the two middle ranks.
        metrics[f"{name}_median_rank"] = float(torch.floor(torch.quantile(ranks.double(), 0.5))) + 1
    metrics["mean_recall"] = sum(metrics[f"{n}_recall@{k}"] for n in ("i2t", "t2i") for k in ks) / (2 * len(ks))
    return metrics


def validation_retrieval(image: Tensor, text: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """SAIL's in-training validator on one-to-one pairs (N, D): :func:`retrieval_metrics` and the accuracy of cosine signs.

    ``positive_accuracy`` is the share of pairs with a cosine above 0, ``negative_accuracy`` of non-pairs below 0.
    """
    metrics = retrieval_metrics(image, text, torch.arange(len(image), device=image.device), ks)
    return metrics | _sign_accuracies(F.normalize(image, dim=-1), F.normalize(text, dim=-1))


def _sign_accuracies(image: Tensor, text: Tensor) -> dict[str, float]:
    diagonal = (image * text).sum(dim=-1)
    tiles = image.split(SCORES.rows(image.device, len(text)))
    negative = sum(int((tile @ text.T < 0).sum()) for tile in tiles)
    others = max(len(image) * (len(image) - 1), 1)
    return {
        "positive_accuracy": (diagonal > 0).double().mean().item(),
        "negative_accuracy": (negative - int((diagonal < 0).sum())) / others,
    }


def grouped_retrieval(image: Tensor, text: Tensor, group: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall, precision and mean average precision at ``ks`` in percent of pairs whose items may occur several times.

    STRUCTURE's protocol: rows (N, D) on both sides, one per caption, so that an image stands
    among the candidates once for each of its captions; a candidate is right if it has the query's ``group`` (N,). R@k: any
    right one among the first k; P@k: right ones / k; MAP@k divides by the number of right ones, at most k.
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    num_relevant = torch.bincount(group)[group].double()
    metrics: dict[str, float] = {}
    for name, queries, pool in (("i2t", image, text), ("t2i", text, image)):
        hits = []
        for rows in torch.arange(len(group), device=group.device).split(NEIGHBOURS.rows(group.device, len(group))):
            best = (queries[rows] @ pool.T).topk(min(max(ks), len(group)), dim=1).indices
            hits.append(group[best] == group[rows, None])
        right = torch.cat(hits).double()
        precision = right.cumsum(dim=1) / torch.arange(1, right.shape[1] + 1, device=right.device)
        for k in ks:
            average = (precision * right)[:, :k].sum(dim=1) / num_relevant.clamp(max=k)
            metrics[f"{name}.R@{k}"] = right[:, :k].amax(dim=1).mean().item() * 100
            metrics[f"{name}.P@{k}"] = (right[:, :k].sum(dim=1) / k).mean().item() * 100
            metrics[f"{name}.MAP@{k}"] = average.mean().item() * 100
    return metrics
