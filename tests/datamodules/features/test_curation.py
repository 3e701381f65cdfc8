"""Curation: the running top-M equals a full stable sort, whatever the chunks; the selection takes nothing twice."""

import numpy as np
import pytest
import torch

from datamodules.features import curation
from datamodules.features.curation import (
    BestPerConcept,
    best_captions,
    half_cosines,
    prototypes_from_images,
    select_balanced,
)
from models.errors import UserError
from tests.golden.freeze_align import quantise_scores


def test_running_best_is_the_stable_sort_with_ties(monkeypatch):
    monkeypatch.setattr(curation, "CHUNK_ROWS", 16)
    torch.manual_seed(0)
    scores = torch.randint(-20, 20, (300, 7)).float() / 64  # many ties
    expected = scores.sort(dim=0, descending=True, stable=True)
    for step in (1, 5, 16):
        best = BestPerConcept(7, 25)
        for start in range(0, 300, step):
            for first in (0, 4):
                block = scores[start : start + step, first : (4 if first == 0 else 7)]
                best.add(block, start, first)
        found = best.result()
        torch.testing.assert_close(found.scores.T, expected.values[:25])
        assert torch.equal(found.rows.T, expected.indices[:25])


def test_pieces_of_the_pool_do_not_matter():
    torch.manual_seed(0)
    pool, prototypes = torch.randn(500, 12), torch.randn(6, 12)
    whole, pieces = best_captions([pool], prototypes, 40), best_captions(pool.split(77), prototypes, 40)
    assert torch.equal(whole.rows, pieces.rows)
    expected = half_cosines(pool, prototypes).float().sort(dim=0, descending=True, stable=True).values[:40]
    torch.testing.assert_close(whole.scores.T, expected)


def test_small_pool_leaves_places_empty():
    found = best_captions([torch.eye(3)], torch.eye(3)[:2], 5)
    assert found.rows.shape == (2, 3)


def test_selection_is_balanced_and_takes_nothing_twice():
    torch.manual_seed(0)
    pool, prototypes = torch.randn(400, 8), torch.randn(5, 8)
    chosen = select_balanced(best_captions([pool], prototypes, 100), 20, 400)
    assert len(np.unique(chosen.rows)) == len(chosen.rows) == 100
    assert np.bincount(chosen.concepts).tolist() == [20] * 5
    assert np.all(np.diff(chosen.rows) > 0)


def test_scores_out_of_range_are_clipped_one_by_one():
    assert quantise_scores(torch.tensor([0.05, 0.5, -0.5])).tolist() == [0, 127, -128]


def test_prototypes_are_unit_means_and_need_an_image_each():
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    made = prototypes_from_images(features, torch.tensor([0, 1, 1]), 2)
    torch.testing.assert_close(made, torch.eye(2))
    with pytest.raises(UserError, match="no image"):
        prototypes_from_images(features, torch.tensor([0, 1, 1]), 3)
