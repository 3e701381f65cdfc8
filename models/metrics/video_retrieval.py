"""Retrieval metrics of video-language papers, with their treatment of ties; scores are a whole matrix of texts x videos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def text_to_video_ranks(scores: Tensor, owner: Tensor) -> Tensor:
    """(n,) rank from 0 of each text's own video: the number of videos with a strictly larger score (ties in its favour).

    Args:
        scores: (n, m).
        owner: (n,) int64, the video of each text.

    A score that is not finite ranks last.
    """
    true_scores = scores.gather(1, owner[:, None])
    ranks = (scores > true_scores).sum(dim=1).double()
    return torch.where(true_scores[:, 0].isfinite(), ranks, float(scores.shape[1] - 1))


def video_to_text_ranks(scores: Tensor, owner: Tensor) -> Tensor:
    """(m,) rank from 0 of each video's best own text: min over them of #larger + (#equal - 1) / 2, ties averaged."""
    texts, videos = scores.shape
    best = torch.full((videos,), float(texts - 1), dtype=torch.float64, device=scores.device)
    for text in range(texts):  # a column is compared as a whole; texts x texts never are
        true_score, column = scores[text, owner[text]], scores[:, owner[text]]
        if true_score.isfinite():
            rank = (column > true_score).sum() + ((column == true_score).sum() - 1) / 2
            best[owner[text]] = torch.minimum(best[owner[text]], rank.double())
    return best


def rank_summary(ranks: Tensor, ks: Sequence[int] = (1, 5, 10, 50)) -> dict[str, float]:
    """R@K in percent (share of ranks below K), median and mean rank from 1; the median averages the two middle ranks.

    R@1 counts only a rank of exactly 0: a half rank, shared with another text, is no hit there but is below 5 (official).
    """
    ranks = ranks.double()
    metrics = {f"recall@{k}": ((ranks < k) if k > 1 else (ranks == 0)).double().mean().item() * 100 for k in ks}
    return metrics | {"median_rank": ranks.quantile(0.5).item() + 1, "mean_rank": ranks.mean().item() + 1}


def pair_ranks(scores: Tensor, owner: Tensor, ks: Sequence[int] = (1, 5, 10), letter: str = "v") -> dict[str, float]:
    """``t2v_<measure>`` and ``v2t_<measure>`` of :func:`rank_summary` for scores (n, m) and the video of each text (n,).

    ``letter`` takes the place of v where the media are others.
    """
    ranks = {f"t2{letter}": text_to_video_ranks(scores, owner), f"{letter}2t": video_to_text_ranks(scores, owner)}
    return {f"{way}_{measure}": value for way, of in ranks.items() for measure, value in rank_summary(of, ks).items()}


def any_hit_recall(scores: Tensor, right: Tensor, k: int) -> float:
    """Share of queries (q,) with any right candidate among the k with the largest scores: scores, right (q, c)."""
    top = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return right.gather(1, top).any(dim=1).double().mean().item()
