"""Neighbourhood metrics and CKA against whole-matrix references and scikit-learn."""

import pytest
import torch
import torch.nn.functional as F
from sklearn import manifold

from models.metrics.cka import linear_cka, local_cka
from models.metrics.embedding_quality import trustworthiness
from models.metrics.neighbourhoods import (
    LayerPairs,
    best_pair,
    cka,
    cknna,
    cycle_knn,
    mutual_knn,
    nearest_neighbours,
    neighbour_count,
)
from models.metrics.probing import AlignmentProbe
from tests.reference import structure as plain


@pytest.fixture
def sides():
    torch.manual_seed(0)
    vision = torch.randn(60, 3, 8)
    return vision, torch.cat([vision[:, :2, :6] + 0.5 * torch.randn(60, 2, 6), torch.randn(60, 2, 6)], dim=1)


def test_scores_of_all_layer_pairs(sides):
    scores = LayerPairs(*sides).scores()
    torch.testing.assert_close(scores, plain.mutual_knn_scores(*sides))
    assert best_pair(scores) in ((0, 0), (1, 1))


def test_neighbours_do_not_depend_on_the_tile(sides):
    x = F.normalize(sides[0][:, 0], dim=-1)
    assert torch.equal(nearest_neighbours(x, 5, tile_entries=60 * 7), nearest_neighbours(x, 5))
    assert not (nearest_neighbours(x, 5) == torch.arange(60)[:, None]).any()


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_from_covariances_is_that_from_kernels(sides, unbiased):
    x, y = sides[0][:, 0].double(), sides[1][:, 1].double()
    assert cka(x, y, unbiased) == pytest.approx(plain.kernel_cka(x, y, unbiased), abs=1e-9)


def test_cknna_from_lists_is_that_from_matrices(sides):
    x, y = sides[0][:, 0].double(), sides[1][:, 0].double()
    lists = nearest_neighbours(x, 6), nearest_neighbours(y, 6)
    assert cknna(x, y, *lists) == pytest.approx(plain.cknna(x, y, 6), abs=1e-9)


def test_mutual_and_cycle_knn_by_hand():
    a, b = torch.tensor([[1], [0], [0]]), torch.tensor([[1], [2], [0]])
    assert mutual_knn(a, b) == pytest.approx(2 / 3)
    assert cycle_knn(a, b) == pytest.approx(1 / 3)  # 0 -> 1 -> 0; 1 -> 2 -> 0; 2 -> 0 -> 1


def test_trustworthiness_is_scikit_learns(sides):
    x, z = sides[0][:, 0], sides[1][:, 1, :2]
    expected = manifold.trustworthiness(x.numpy(), z.numpy(), n_neighbors=4)
    assert trustworthiness(x, z, 4) == pytest.approx(expected, abs=1e-9)
    assert trustworthiness(x, z, 4) == pytest.approx(plain.trustworthiness(x, z, 4), abs=1e-9)


def test_local_cka_adds_one_pair_at_a_time(sides):
    x, y = sides[0][:, 0].double(), sides[1][:, 0].double()
    found = local_cka(x[:40], y[:40], x[40:45], y[40:45])
    wanted = linear_cka(torch.cat([x[:40], x[42:43]]), torch.cat([y[:40], y[44:45]]))
    torch.testing.assert_close(found[2, 4], wanted)


def test_probe_finds_the_pair_that_belongs_together(sides):
    torch.manual_seed(1)
    shared = torch.randn(400, 6)
    vision = [torch.randn(400, 8), torch.cat([shared, torch.randn(400, 2)], dim=1)]
    text = [torch.ones(400, 5), shared @ torch.randn(6, 7)]
    scores = AlignmentProbe(vision, text).scores()
    assert best_pair(scores) == (1, 1) and scores[1, 1] > 90 and scores[0, 1] < 20


@pytest.mark.parametrize("rule, k", [("rice", 35), ("sqrt", 71), ("sturges", 14), (7, 7)])
def test_neighbour_counts(rule, k):
    assert neighbour_count(rule, 5000) == k


def test_bad_requests(sides):
    with pytest.raises(ValueError, match="neighbours"):
        neighbour_count(10, 10)
    with pytest.raises(ValueError, match="unknown metric"):
        LayerPairs(*sides).scores("cosine")
