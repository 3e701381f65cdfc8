"""Which tokens the entities of a text cover, and which entities a masked text may still show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.arl.graph import NO_ENTITY
from models.batch import IGNORE_INDEX

Entity = tuple[int, int, int]  # first token, last token, id


class Placed(NamedTuple):
    """``ids`` (M,), NO_ENTITY at empty places; ``cover`` (M, L) float32, 1 where an entity covers a token."""

    ids: NDArray[np.int64]
    cover: NDArray[np.float32]


def token_spans(spans: Sequence[Sequence[int]], offsets: NDArray[np.int64]) -> list[Entity]:
    """Entities by tokens, in the order of the text; those whose first or last character belongs to no token are dropped.

    Args:
        spans: first character, character behind the last one, id.
        offsets: (L, 2) first character of each token and the one behind its last; equal where a token has no characters.
    """
    entities = []
    for start, end, number in spans:
        first, last = (_token(place, offsets) for place in (start, end - 1))
        if first is not None and last is not None:
            entities.append((first, last, int(number)))
    return entities


def _token(place: int, offsets: NDArray[np.int64]) -> int | None:
    """The token that the character belongs to."""
    tokens = np.flatnonzero((offsets[:, 0] <= place) & (place < offsets[:, 1]))
    return int(tokens[0]) if len(tokens) else None


def continuations(entities: Sequence[Entity], length: int) -> NDArray[np.bool_]:
    """(L,) tokens of an entity behind its first one: they are masked together with it."""
    continues = np.zeros(length, dtype=bool)
    for first, last, _ in entities:
        continues[first + 1 : last + 1] = True
    return continues


def place_entities(entities: Sequence[Entity], length: int, count: int = 24, labels: NDArray[np.int64] | None = None) -> Placed:
    """The first ``count`` entities of a text.

    Args:
        entities: from :func:`token_spans`.
        length: L.
        count: M.
        labels: (L,) of masked tokens: an entity that covers any of them is left out, as its vector would tell the word.
    """
    ids = np.full(count, NO_ENTITY, dtype=np.int64)
    cover = np.zeros((count, length), dtype=np.float32)
    shown = [entity for entity in entities if labels is None or (labels[entity[0] : entity[1] + 1] == IGNORE_INDEX).all()]
    for place, (first, last, number) in enumerate(shown[:count]):
        ids[place] = number
        cover[place, first : last + 1] = 1
    return Placed(ids, cover)
