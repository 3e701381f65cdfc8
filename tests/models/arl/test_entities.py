"""Entities by characters to entities by tokens."""

import numpy as np

from models.arl.entities import continuations, place_entities, token_spans
from models.arl.graph import NO_ENTITY

OFFSETS = np.array([[0, 0], [0, 4], [5, 9], [9, 12], [13, 15], [0, 0]])


def test_spans_whose_ends_belong_to_no_token_are_dropped():
    spans = [[0, 4, 7], [5, 12, 8], [4, 9, 1], [9, 13, 2], [13, 99, 3], [13, 15, 4]]
    assert token_spans(spans, OFFSETS) == [(1, 1, 7), (2, 3, 8), (4, 4, 4)]


def test_masked_entities_make_room():
    entities = [(1, 1, 7), (2, 3, 8), (4, 4, 4)]
    assert continuations(entities, 6).nonzero()[0].tolist() == [3]
    placed = place_entities(entities, 6, count=2)
    assert placed.ids.tolist() == [7, 8] and placed.cover.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
    labels = np.full(6, -100)
    labels[3] = 5
    guarded = place_entities(entities, 6, count=3, labels=labels)
    assert guarded.ids.tolist() == [7, 4, NO_ENTITY] and not guarded.cover[2].any()
