"""Entity vectors from triples: TransE (Bordes et al., NeurIPS 2013), with which ARL's knowledge graph starts.

Shapes: E entities, R relations, T triples (head, tail, relation), K width, B batch, N negatives of a positive.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.io import read_tensors

RETRIES = 10  # draws in place of corrupted triples that are true


def train_transe(
    triples: Tensor,
    entities: int,
    relations: int,
    width: int = 256,
    epochs: int = 1000,
    batches: int = 100,
    negatives: int = 25,
    margin: float = 5.0,
    lr: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """(E, K) vectors such that head + relation is close to tail; the defaults are the official ones.

    A positive should be closer (L1, of unit vectors) by the margin than triples with another head or tail. Which of both is
    replaced follows the numbers of heads per tail and of tails per head ("Bernoulli"); what is true is not drawn.

    Args:
        triples: (T, 3) int64 head, tail, relation.
        entities: E.
        relations: R.
        width: K.
        epochs: passes over the triples.
        batches: steps of an epoch.
        negatives: N.
        margin: of the ranking loss.
        lr: of plain gradient descent.
        seed: of initial vectors and draws.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = [math.sqrt(6 / (rows + width)) for rows in (entities, relations)]
    vectors, moves = (
        nn.Parameter(torch.empty(rows, width).uniform_(-limit, limit, generator=generator))
        for rows, limit in zip((entities, max(relations, 1)), bound, strict=True)
    )
    if not len(triples):
        return vectors.detach()
    optimizer = torch.optim.SGD([vectors, moves], lr=lr)
    true, share = _codes(triples, entities).unique(), head_share(triples, relations)
    size = math.ceil(len(triples) / batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(triples), generator=generator).split(size):
            positive = triples[rows]
            false = corrupt(positive.repeat_interleave(negatives, dim=0), entities, share, true, generator)
            near, far = (distance(vectors, moves, part) for part in (positive, false))
            loss = (margin + near[:, None] - far.view(len(rows), negatives)).clamp(min=0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return vectors.detach()


def load_vectors(triples: Tensor, entities: int, relations: int, path: str, name: str = "ent_embeddings.weight") -> Tensor:
    """(E, K) vectors of a file, in the place of :func:`train_transe` (the official ``ent_embeddings.ckpt``).

    Args:
        triples: not read.
        entities: E.
        relations: not read.
        path: of the file.
        name: of the tensor in it.

    Raises UserError where the file has no vectors for these entities.
    """
    tensors = read_tensors(path)
    if name not in tensors or len(tensors[name]) != entities:
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        raise UserError(f"{path} has no '{name}' of {entities} entities, but {shapes}: it belongs to another graph.")
    return tensors[name].float()


def distance(vectors: Tensor, moves: Tensor, triples: Tensor) -> Tensor:
    """(B,) L1 distance of head + relation from tail, of unit vectors."""
    head, tail = (F.normalize(vectors[triples[:, place]], dim=-1) for place in (0, 1))
    return (head + F.normalize(moves[triples[:, 2]], dim=-1) - tail).abs().sum(dim=-1)


def head_share(triples: Tensor, relations: int) -> Tensor:
    """(R,) how often the head is replaced: tails per head over tails per head and heads per tail together."""
    share = torch.full((max(relations, 1),), 0.5)
    for relation in range(relations):
        of_relation = triples[triples[:, 2] == relation]
        if len(of_relation):
            tails_per_head, heads_per_tail = (len(of_relation) / len(of_relation[:, place].unique()) for place in (0, 1))
            share[relation] = tails_per_head / (tails_per_head + heads_per_tail)
    return share


def corrupt(triples: Tensor, entities: int, share: Tensor, true: Tensor, generator: torch.Generator) -> Tensor:
    """The triples (B, 3), each with another head or tail; one that stays true after a few draws is left as drawn.

    Args:
        triples: (B, 3).
        entities: E.
        share: (R,) from :func:`head_share`.
        true: sorted codes of the true triples.
        generator: of the draws.
    """
    place = (torch.rand(len(triples), generator=generator) >= share[triples[:, 2]]).long()
    false, open_rows = triples.clone(), torch.arange(len(triples))
    for _ in range(RETRIES):
        false[open_rows, place[open_rows]] = torch.randint(entities, (len(open_rows),), generator=generator)
        codes = _codes(false[open_rows], entities)
        spot = torch.searchsorted(true, codes).clamp(max=len(true) - 1)
        open_rows = open_rows[true[spot] == codes]
        if not len(open_rows):
            break
    return false


def _codes(triples: Tensor, entities: int) -> Tensor:
    """One number per triple."""
    return (triples[:, 2] * entities + triples[:, 0]) * entities + triples[:, 1]
