"""Concept-balanced subsets of a caption pool larger than memory (freeze-align, arXiv 2409.19425, section 3.3).

Each concept has a prototype. Every caption of the pool is scored against all prototypes chunk by chunk, the best of each
concept are kept on the way, and the subset takes equally many for each concept, the rarest concept first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import UserError

CHUNK_ROWS = 2048
BLOCK_CONCEPTS = 1024
_ROW_BITS = 40


class TopPerConcept(NamedTuple):
    """The best captions of each concept, best first: ``scores`` (C, M) float32 and ``rows`` (C, M) of the pool.

    Equal scores stand in pool order. A concept with fewer than M captions has score -inf and row -1 in the rest.
    """

    scores: Tensor
    rows: Tensor


class Selected(NamedTuple):
    """The subset in pool order: row of the pool, concept it was taken for, and its score, each (n,)."""

    rows: np.ndarray
    concepts: np.ndarray
    scores: np.ndarray


def half_cosines(captions: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines (B, C) of captions (B, D) with prototypes (C, D), of vectors rounded to half and rounded to half (official)."""
    captions, prototypes = (F.normalize(x.float(), dim=-1).half().float() for x in (captions, prototypes))
    return (captions @ prototypes.T).half()


def prototypes_from_images(features: Tensor, labels: Tensor, num_concepts: int, shots: int = 128) -> Tensor:
    """Prototypes (C, D): the mean of up to ``shots`` unit-length image features (N, D) of each concept, unit-length.

    The released prototypes are of this kind; how exactly they were made is not established. Raises UserError naming
    concepts without images.
    """
    missing = [c for c in range(num_concepts) if not bool((labels == c).any())]
    if missing:
        raise UserError(f"{len(missing)} of {num_concepts} concepts have no image for a prototype, the first {missing[:5]}.")
    centres = (F.normalize(features[labels == c][:shots].float(), dim=-1).mean(dim=0) for c in range(num_concepts))
    return F.normalize(torch.stack(list(centres)), dim=-1)


class BestPerConcept:
    """Running top-M of each concept over a pool that arrives in chunks; memory is C x 1.5 M x 8 bytes.

    Exact and deterministic: the order is (score descending, pool row ascending), whatever the chunks. Scores count in
    half precision.

    Args:
        num_concepts: C (official: 2,754).
        keep: M (official: 50,000).
    """

    def __init__(self, num_concepts: int, keep: int):
        self.keep = keep
        self.capacity = keep + max(keep // 2, CHUNK_ROWS)
        # A key is the score's rank above the inverted row: one int64 that sorts by both.
        self.keys = torch.full((num_concepts, self.capacity), -1, dtype=torch.int64)
        self.counts = torch.zeros(num_concepts, dtype=torch.int64)
        self.worst = torch.full((num_concepts,), -torch.inf)  # what a caption must exceed to enter

    def add(self, scores: Tensor, start: int, first_concept: int = 0) -> None:
        """Scores (B <= CHUNK_ROWS, c) of the pool rows from ``start`` on with the concepts from ``first_concept`` on."""
        mine = slice(first_concept, first_concept + scores.shape[1])
        entering = (scores > self.worst[mine]).flatten().nonzero().squeeze(1)
        if not len(entering):
            return
        rows = entering.div(scores.shape[1], rounding_mode="floor")
        concepts, order = (entering - rows * scores.shape[1]).sort(stable=True)
        keys = _keys(scores.flatten()[entering[order]], rows[order] + start)
        arrived = torch.bincount(concepts, minlength=scores.shape[1])
        if bool((self.counts[mine] + arrived > self.capacity).any()):
            self._compact(mine)
        place = torch.arange(len(concepts)) - (arrived.cumsum(0) - arrived)[concepts] + self.counts[mine][concepts]
        self.keys[mine][concepts, place] = keys
        self.counts[mine] += arrived

    def result(self) -> TopPerConcept:
        """The best so far; M is smaller where the whole pool is."""
        self._compact(slice(None))
        size = int(self.counts.max())
        keys = self.keys[:, :size]
        scores, rows = _unpack(keys)
        return TopPerConcept(scores.masked_fill(keys < 0, -torch.inf), rows.masked_fill(keys < 0, -1))

    def _compact(self, mine: slice) -> None:
        keys, counts, worst = self.keys[mine], self.counts[mine], self.worst[mine]
        for block in range(0, len(keys), 64):  # topk makes copies: a few concepts at a time
            part = keys[block : block + 64]
            best = part.topk(self.keep, dim=1).values
            part.fill_(-1)
            part[:, : self.keep] = best
            full = best[:, -1] >= 0
            worst[block : block + 64] = torch.where(full, _unpack(best[:, -1])[0], -torch.inf)
        counts.clamp_(max=self.keep)


def best_captions(pool: Iterable[Tensor], prototypes: Tensor, keep: int, device: str | torch.device = "cpu") -> TopPerConcept:
    """The ``keep`` captions of a pool nearest to each prototype (C, D), in one pass over chunks (n, D) of any size.

    The products run on ``device``.
    """
    best = BestPerConcept(len(prototypes), keep)
    prototypes = F.normalize(prototypes.float(), dim=-1).half().to(device, torch.float32)
    start = 0
    for piece in pool:
        for chunk in piece.split(CHUNK_ROWS):
            captions = F.normalize(chunk.to(device, torch.float32), dim=-1).half().float()
            for first in range(0, len(prototypes), BLOCK_CONCEPTS):
                scores = captions @ prototypes[first : first + BLOCK_CONCEPTS].T
                best.add(scores.cpu(), start, first)
            start += len(chunk)
    return best.result()


def select_balanced(best: TopPerConcept, per_concept: int, pool_size: int, last_row: int | None = -1) -> Selected:
    """Up to ``per_concept`` captions for each concept, none twice, from :func:`best_captions`.

    Concepts choose in ascending order of the score in column ``last_row`` of their list (official: the last one, so that
    the rarest concept comes first; None: of the mean score), each walking down its list past what is taken. As in the
    official code the list's last entry is never taken.
    """
    key = best.scores.clamp(min=-2).mean(dim=1) if last_row is None else best.scores[:, last_row]
    taken_for = np.full(pool_size, -1, np.int64)
    score_of = np.zeros(pool_size, np.float32)
    for concept in key.argsort(stable=True).tolist():
        rows, scores = best.rows[concept, :-1].numpy(), best.scores[concept, :-1].numpy()
        usable = rows >= 0
        rows, scores = rows[usable], scores[usable]
        free = np.flatnonzero(taken_for[rows] < 0)[:per_concept]
        taken_for[rows[free]] = concept
        score_of[rows[free]] = scores[free]
    rows = np.flatnonzero(taken_for >= 0)
    return Selected(rows, taken_for[rows], score_of[rows])


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    bits = scores.half().view(torch.int16).to(torch.int64)
    rank = torch.where(bits < 0, bits ^ 0x7FFF, bits) + 2**15  # negative halfs sort in reverse by their bits
    return (rank << _ROW_BITS) | (2**_ROW_BITS - 1 - rows)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    rank = (keys >> _ROW_BITS) - 2**15
    bits = torch.where(rank < 0, rank ^ 0x7FFF, rank).to(torch.int16)
    return bits.view(torch.half).float(), 2**_ROW_BITS - 1 - (keys & (2**_ROW_BITS - 1))
