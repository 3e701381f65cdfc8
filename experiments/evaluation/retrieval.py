"""Image-text retrieval in both directions, with several captions per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from models.metrics.retrieval import chance_recall_at, recall_at, retrieval_ranks

EXAMPLES = 6


def retrieval(split: EmbeddedSplit, ks: Sequence[int] = (1, 5, 10)) -> SuiteResult:
    """Recall at ``ks`` (percent) and the median rank (1 is best), image-to-text and text-to-image."""
    i2t, t2i = retrieval_ranks(split.image, split.text, split.owner)
    images, texts = len(split.image), len(split.text)
    right = torch.bincount(split.owner, minlength=images)
    metrics: dict[str, float] = {}
    chance: dict[str, float] = {}
    for name, ranks, pool, good in (("i2t", i2t, texts, right), ("t2i", t2i, images, 1)):
        for k in ks:
            metrics[f"retrieval/{name}_recall@{k}"] = recall_at(ranks, k)
            chance[f"retrieval/{name}_recall@{k}"] = chance_recall_at(k, pool, good)
        metrics[f"retrieval/{name}_median_rank"] = ranks.double().median().item() + 1
    return SuiteResult(metrics, chance, dict(split.hashes), pictures={"examples": _examples(split)})


def _examples(split: EmbeddedSplit, shown: int = 5) -> list[dict]:
    """A few captions, spread over the pool, with the images that fit them best."""
    picked = torch.linspace(0, len(split.text) - 1, min(EXAMPLES, len(split.text))).long()
    scores = F.normalize(split.text[picked], dim=-1) @ F.normalize(split.image, dim=-1).T
    best = scores.topk(min(shown, scores.shape[1]), dim=1).indices
    return [
        {"caption": split.captions[int(q)], "right": int(split.owner[q]), "images": rows.tolist()}
        for q, rows in zip(picked, best, strict=True)
    ]
