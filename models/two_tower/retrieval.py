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
    """(P,) logits of "match" of P texts with P images, or scores of the head of ``rank`` where the model has one.

    One image may stand for P equal ones: what does not depend on the text is computed once then.
    """
    pooled = model.fuse(texts, images, read="first").pooled
    return (model.rank_output(pooled)[:, 0] if "rank" in model.tasks else model.itm_score.fc(pooled)[:, 1]).float()


def candidates(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(images, texts) bool twice: the ``count`` best images of each text, the ``count`` best texts of each image."""
    by_text, by_image = (torch.zeros_like(similarity, dtype=torch.bool) for _ in range(2))
    by_text.scatter_(0, similarity.topk(min(count, len(similarity)), dim=0).indices, True)
    by_image.scatter_(1, similarity.topk(min(count, similarity.shape[1]), dim=1).indices, True)
    return by_text, by_image


class PairScorer:
    """Scores many pairs of the same texts, each of which is encoded once.

    An image is joined with a batch of its candidates at a time, texts of similar lengths, so that little padding is left.

    Args:
        model: with the head of ``match`` or ``rank``.
        texts: see :meth:`TwoTower.encode_text`.
        batch_size: pairs of a forward pass.
    """

    @torch.no_grad()
    def __init__(self, model: TwoTower, texts: Encoded, batch_size: int = 64):
        self.model, self.texts, self.batch_size = model, model.start("text", texts), batch_size
        self.lengths = texts.mask.sum(dim=1).cpu()

    @torch.no_grad()
    def __call__(self, images: Encoded, chosen: Tensor) -> Tensor:
        """(images, texts) scores of the pairs that are ``chosen`` (images, texts), -inf elsewhere; on the CPU."""
        images, scores = self.model.start("image", images), torch.full(chosen.shape, -torch.inf)
        pairs, values = [], []
        for image, row in enumerate(chosen.cpu()):
            texts = row.nonzero()[:, 0]
            texts = texts[self.lengths[texts].argsort(stable=True)]
            for batch in texts.split(self.batch_size):
                rows = self.texts.rows(batch.to(images.feature.device))
                rows = self.model.shortened(rows, int(self.lengths[batch[-1]]))
                values.append(match_scores(self.model, rows, images.rows(slice(image, image + 1))))
                pairs.append((image, batch))
        for (image, batch), of_batch in zip(pairs, values, strict=True):
            scores[image, batch] = of_batch.cpu()
        return scores


def rerank(model: TwoTower, texts: Encoded, images: Encoded, count: int, batch_size: int = 64) -> Reranked:
    """Score the ``count`` best images of each text and the ``count`` best texts of each image; each pair once."""
    with torch.no_grad():
        similarity = model.embed_image(images) @ model.embed_text(texts).T  # (images, texts)
    by_text, by_image = (part.cpu() for part in candidates(similarity, count))
    scores = PairScorer(model, texts, batch_size)(images, by_text | by_image)
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
