"""Retrieval between texts and images or clips, in both directions, by a dual encoder, a fused model, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.evaluation.base import EmbeddedSplit, EmbedsPairs, ScoresPairs, SuiteResult, TrainedSplit, spread
from experiments.evaluation.errors import ErrorRow, strip, wrong_retrievals
from experiments.figures import canvas, clips
from models.batch import INDEX
from models.captions import clean_caption
from models.errors import UserError
from models.io import stable_hash
from models.metrics.retrieval import chance_recall_at, metrics_of_ranks, retrieval_ranks
from models.metrics.video_retrieval import any_hit_recall, pair_ranks, text_to_video_ranks

EXAMPLES = 6  # queries that are drawn in each direction
SHOWN = 5  # candidates shown for each


def retrieval(split: EmbeddedSplit, ks: Sequence[int] = (1, 5, 10), cleaned_words: int | None = None) -> SuiteResult:
    """Recall at ``ks`` (percent), median and mean rank (1 is best), image-to-text and text-to-image.

    Args:
        cleaned_words: clean the captions (lower case, no punctuation) and keep their first words, as many as this, before they
            are encoded. Official (freeze-align): 30, although training captions are raw; None takes them as in training.
    """
    if cleaned_words is not None:
        captions = [clean_caption(caption, cleaned_words) for caption in split.captions]
        hashes = {**split.hashes, "prompts": stable_hash(["cleaned", cleaned_words])}
        split = replace(split, text=split.encode_text(captions), captions=captions, hashes=hashes)
    ranks = retrieval_ranks(split.image, split.text, split.owner)
    metrics = {f"retrieval/{name}": value for name, value in metrics_of_ranks(*ranks, ks).items()}
    figures = {
        "retrieved_images": partial(canvas.retrieved_images, _best_images(split), split.load_image),
        "retrieved_captions": partial(canvas.retrieved_captions, _best_captions(split), split.load_image),
    }
    baselines = {"chance": _chance(split.owner, len(split.image), ks)}
    return SuiteResult(metrics, baselines, dict(split.hashes), figures=figures, errors={"retrieval": _errors(split, ranks[1])})


def _errors(split: EmbeddedSplit, ranks: Tensor) -> list[ErrorRow]:
    nearest = lambda text: int(_nearest(split.text[[text]], split.image)[0, 0])  # noqa: E731
    return wrong_retrievals(ranks, split.owner, nearest, split.captions.__getitem__, split.load_image)


def pair_retrieval(
    split: TrainedSplit, ks: Sequence[int] = (1, 5, 10), views: int = 1, rerank: int = 0, batch_size: int = 32
) -> SuiteResult:
    """Recall at ``ks`` (percent), median and mean rank over the whole split of a module that trains on raw data.

    ``retrieval/...`` is the dual encoder's, ``reranked/...`` after the fused model has scored its best candidates again, and
    ``fused/...`` the fused model's alone, which scores every pair: texts x media forward passes.

    Args:
        views: passes whose similarities are averaged; the first sees the middle frames, further ones random frames (the
            official three of All-in-One are all random).
        rerank: with a dual encoder, how many of the best media of each text, and of the best texts of each medium, the fused
            model scores again; all other pairs rank behind. 0: none.
        batch_size: pairs per fused forward pass.

    A text gives ties to its own medium; for a medium ties are averaged (All-in-One, official). R@1 with ties counts only a
    rank of its own.
    """
    module, letter = split.module, split.module.medium[0]
    if not module.embeds_pairs and not module.scores_pairs:
        raise UserError(
            f"retrieval: {type(module).__name__} as it is configured has neither a dual encoder nor a head that scores pairs."
        )
    if rerank and not module.scores_pairs:
        raise UserError("evaluation.retrieval.rerank needs a module with a head that scores pairs.")
    read = _Read(split, keep_media=rerank > 0 or not module.embeds_pairs)
    scores: dict[str, Tensor] = {}
    if module.embeds_pairs:
        scores["retrieval"] = _similarity(split, read, views)
    if rerank or not module.embeds_pairs:
        chosen = _candidates(scores["retrieval"], rerank) if module.embeds_pairs else torch.ones(read.shape, dtype=torch.bool)
        scores["reranked" if module.embeds_pairs else "fused"] = _fused(module, read, chosen, batch_size)
    metrics: dict[str, float] = {}
    chance: dict[str, float] = {}
    for name, matrix in scores.items():
        metrics |= {f"{name}/{key}": value for key, value in pair_ranks(matrix, read.owner, ks, letter).items()}
        chance |= _chance(read.owner, read.shape[1], ks, name, letter)
        if name == "fused":
            right = read.owner[:, None] == torch.arange(read.shape[1])
            metrics |= {f"fused/any_hit_recall@{k}": 100 * any_hit_recall(matrix, right, k) for k in ks}
    matrix = next(iter(scores.values()))
    best = matrix.topk(min(4, read.shape[1]), dim=1).indices
    examples = [
        {"text": read.caption(i), "right": read.rows[read.owner[i]], "rows": [read.rows[j] for j in best[i].tolist()]}
        for i in spread(EXAMPLES, read.shape[0])
    ]
    figures = {"retrieved_clips": partial(clips.retrieved, examples, split.dataset.display)}
    errors = wrong_retrievals(
        text_to_video_ranks(matrix, read.owner),
        read.owner,
        lambda text: int(matrix[text].argmax()),
        read.caption,
        lambda medium: strip(split.dataset.display(read.rows[medium])),
    )
    return SuiteResult(metrics, {"chance": chance}, split.hashes, figures=figures, errors={"retrieval": errors})


class _Read:
    """The texts and, where they are scored together, the media of a split, on the CPU."""

    def __init__(self, split: TrainedSplit, keep_media: bool):
        self.rows: list[int] = []
        texts, owner = [], []
        self.media: list[dict[str, Tensor]] = []
        for batch in split.batches():
            text, media, of_batch = split.module.pair_inputs(batch)
            texts.append({name: value.cpu() for name, value in text.items()})
            owner.append(of_batch.cpu() + len(self.rows))
            self.rows += batch[INDEX].tolist()
            if keep_media:
                # Clones: a row of a batch would keep the whole batch in memory.
                count = len(batch[INDEX])
                self.media += [{name: value[i : i + 1].cpu().clone() for name, value in media.items()} for i in range(count)]
        self.texts = {name: torch.cat([part[name] for part in texts]) for name in texts[0]}
        self.owner = torch.cat(owner)
        self.shape = len(self.owner), len(self.rows)
        self._samples = split.dataset.samples

    def text(self, rows: Tensor | slice, device: torch.device) -> dict[str, Tensor]:
        return {name: value[rows].to(device) for name, value in self.texts.items()}

    def caption(self, text: int) -> str:
        first = int((self.owner[:text] == self.owner[text]).sum())
        texts = self._samples[self.rows[self.owner[text]]].texts
        return texts[first % len(texts)]


def _similarity(split: TrainedSplit, read: _Read, views: int) -> Tensor:
    """(n, m) cosines of texts with media, averaged over the views."""
    module: EmbedsPairs = split.module
    starts = range(0, read.shape[0], 256)
    texts = torch.cat([module.embed_texts(read.text(slice(a, a + 256), module.device)).float() for a in starts])
    texts, total = F.normalize(texts, dim=-1), torch.zeros(read.shape)
    for view in range(views):
        batches = split.batches(view=view) if view else split.batches()
        media = torch.cat([module.embed_media(module.pair_inputs(batch)[1]).float() for batch in batches])
        total += (texts @ F.normalize(media, dim=-1).T).cpu()
    if not bool(torch.isfinite(total).all()):
        raise UserError("retrieval: embeddings are not finite. Use an earlier checkpoint, or train with a lower optimizer.lr.")
    return total / views


def _candidates(scores: Tensor, count: int) -> Tensor:
    """(n, m) bool: the best ``count`` media of each text and the best ``count`` texts of each medium."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(min(count, scores.shape[1]), dim=1).indices, True)
    return chosen.scatter_(0, scores.topk(min(count, scores.shape[0]), dim=0).indices, True)


def _fused(module: ScoresPairs, read: _Read, chosen: Tensor, batch_size: int) -> Tensor:
    """(n, m) scores of the ``chosen`` pairs; minus infinity elsewhere. Each medium meets all of its texts in turn."""
    scores = torch.full(read.shape, float("-inf"))
    for column, medium in enumerate(read.media):
        on_device = {name: value.to(module.device) for name, value in medium.items()}
        for rows in chosen[:, column].nonzero().flatten().split(batch_size):
            scores[rows, column] = module.score_pairs(read.text(rows, module.device), on_device).float().cpu()
    if bool(scores.isnan().any()):
        raise UserError("retrieval: scores of pairs are not finite. Use an earlier checkpoint.")
    return scores


def _chance(owner: Tensor, media: int, ks: Sequence[int], name: str = "retrieval", letter: str = "i") -> dict[str, float]:
    texts = torch.bincount(owner, minlength=media)
    chance = {f"{name}/{letter}2t_recall@{k}": chance_recall_at(k, len(owner), texts) for k in ks}
    return chance | {f"{name}/t2{letter}_recall@{k}": chance_recall_at(k, media) for k in ks}


def _best_images(split: EmbeddedSplit) -> list[dict]:
    """A few captions, spread over the pool, with the images that fit them best."""
    picked = spread(EXAMPLES, len(split.text))
    best = _nearest(split.text[picked], split.image)
    return [
        {"caption": split.captions[query], "right": int(split.owner[query]), "images": rows.tolist()}
        for query, rows in zip(picked, best, strict=True)
    ]


def _best_captions(split: EmbeddedSplit) -> list[dict]:
    """A few images, spread over the pool, with the captions that fit them best."""
    picked = spread(EXAMPLES, len(split.image))
    best = _nearest(split.image[picked], split.text)
    return [
        {
            "image": query,
            "captions": [split.captions[row] for row in rows.tolist()],
            "right": (split.owner[rows] == query).tolist(),
        }
        for query, rows in zip(picked, best, strict=True)
    ]


def _nearest(queries: Tensor, pool: Tensor) -> Tensor:
    """Rows of `pool` (M, D) with the highest cosine to each of `queries` (Q, D), best first: (Q, min(SHOWN, M))."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(pool, dim=-1).T
    return scores.topk(min(SHOWN, len(pool)), dim=1).indices
