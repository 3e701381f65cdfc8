"""Image-text retrieval in both directions, with several captions per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from experiments.figures import canvas
from models.captions import clean_caption
from models.io import stable_hash
from models.metrics.retrieval import chance_recall_at, recall_at, retrieval_ranks

EXAMPLES = 6  # queries that are drawn in each direction
SHOWN = 5  # candidates shown for each


def retrieval(split: EmbeddedSplit, ks: Sequence[int] = (1, 5, 10), cleaned_words: int | None = None) -> SuiteResult:
    """Recall at ``ks`` (percent) and the median rank (1 is best), image-to-text and text-to-image.

    Args:
        cleaned_words: clean the captions (lower case, no punctuation) and keep their first words, as many as this, before they
            are encoded. Official (freeze-align): 30, although training captions are raw; None takes them as in training.
    """
    if cleaned_words is not None:
        captions = [clean_caption(caption, cleaned_words) for caption in split.captions]
        hashes = {**split.hashes, "prompts": stable_hash(["cleaned", cleaned_words])}
        split = replace(split, text=split.encode_text(captions), captions=captions, hashes=hashes)
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
    drawn = {
        "retrieved_images": partial(canvas.retrieved_images, _best_images(split), split.load_image),
        "retrieved_captions": partial(canvas.retrieved_captions, _best_captions(split), split.load_image),
    }
    return SuiteResult(metrics, {"chance": chance}, dict(split.hashes), pictures=drawn)


def _best_images(split: EmbeddedSplit) -> list[dict]:
    """A few captions, spread over the pool, with the images that fit them best."""
    picked = torch.linspace(0, len(split.text) - 1, min(EXAMPLES, len(split.text))).long()
    best = _nearest(split.text[picked], split.image)
    return [
        {"caption": split.captions[query], "right": int(split.owner[query]), "images": rows.tolist()}
        for query, rows in zip(picked.tolist(), best, strict=True)
    ]


def _best_captions(split: EmbeddedSplit) -> list[dict]:
    """A few images, spread over the pool, with the captions that fit them best."""
    picked = torch.linspace(0, len(split.image) - 1, min(EXAMPLES, len(split.image))).long()
    best = _nearest(split.image[picked], split.text)
    return [
        {
            "image": query,
            "captions": [split.captions[row] for row in rows.tolist()],
            "right": (split.owner[rows] == query).tolist(),
        }
        for query, rows in zip(picked.tolist(), best, strict=True)
    ]


def _nearest(queries: Tensor, pool: Tensor) -> Tensor:
    """Rows of `pool` (M, D) with the highest cosine to each of `queries` (Q, D), best first: (Q, min(SHOWN, M))."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(pool, dim=-1).T
    return scores.topk(min(SHOWN, len(pool)), dim=1).indices
