"""Re-ranking: the fused model scores the best candidates of the contrastive space again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.metrics.video_retrieval import any_hit_recall
from models.two_tower.model import Encoded, TwoTower

NOT_SCORED = -100.0  # of pairs that are no candidates (official)


class Reranked(NamedTuple):
    """Scores (images, texts), NOT_SCORED outside the candidates: of each text's best images, and of each image's best texts."""

    of_texts: Tensor
    of_images: Tensor

    @property
    def scores(self) -> Tensor:
        """Both together, as the recalls take them."""
        return torch.maximum(self.of_texts, self.of_images)


@torch.no_grad()
def match_scores(model: TwoTower, texts: Encoded, images: Encoded) -> Tensor:
    """(P,) logits of "match" of P texts with P images, or scores of the head of ``rank`` where the model has one."""
    pooled = model.fuse(texts, images, read="first").pooled
    return (model.rank_output(pooled)[:, 0] if "rank" in model.tasks else model.itm_score.fc(pooled)[:, 1]).float()


def candidates(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(images, texts) bool twice: the ``count`` best images of each text, the ``count`` best texts of each image."""
    by_text, by_image = (torch.zeros_like(similarity, dtype=torch.bool) for _ in range(2))
    by_text.scatter_(0, similarity.topk(min(count, len(similarity)), dim=0).indices, True)
    by_image.scatter_(1, similarity.topk(min(count, similarity.shape[1]), dim=1).indices, True)
    return by_text, by_image


@torch.no_grad()
def rerank(model: TwoTower, texts: Encoded, images: Encoded, count: int, batch_size: int = 64) -> Reranked:
    """Score the ``count`` best images of each text and the ``count`` best texts of each image; each pair once.

    What does not depend on the pair is computed once per text and image.
    """
    similarity = model.embed_image(images) @ model.embed_text(texts).T  # (images, texts)
    by_text, by_image = candidates(similarity, count)
    texts, images = model.start("text", texts), model.start("image", images)
    scores = torch.full_like(similarity, NOT_SCORED)
    for rows in (by_text | by_image).nonzero().split(batch_size):
        scores[rows[:, 0], rows[:, 1]] = match_scores(model, texts.rows(rows[:, 1]), images.rows(rows[:, 0]))
    return Reranked(*(torch.where(chosen, scores, NOT_SCORED) for chosen in (by_text, by_image)))


def recalls(scores: Tensor, owner: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """``i2t_recall@k`` and ``t2i_recall@k`` in percent, ties by the order of the pool (official).

    Args:
        scores: (images, texts).
        owner: (texts,) int64 image of each text.
        ks: a query is a hit if any of its k best candidates is right.
    """
    right = owner[None] == torch.arange(len(scores), device=owner.device)[:, None]
    i2t = {f"i2t_recall@{k}": 100 * any_hit_recall(scores, right, k) for k in ks}
    return i2t | {f"t2i_recall@{k}": 100 * any_hit_recall(scores.T, right.T, k) for k in ks}
