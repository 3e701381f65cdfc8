"""Neighbourhood metrics and CKA against whole-matrix references and scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special
from sklearn import cross_decomposition, decomposition, manifold

from experiments.benchmarks.reference import structure as plain
from models.metrics.cka import cka
from models.metrics.embedding_quality import trustworthiness
from models.metrics.neighbourhoods import (
    METRICS,
    LayerPairs,
    best_pair,
    cknna,
    cycle_knn,
    hop_cka,
    hop_similarity,
    lcs_knn,
    mutual_knn,
    nearest_neighbours,
    neighbour_count,
    svcca,
)
from models.metrics.probing import AlignmentProbe


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


def test_longest_common_subsequences_are_those_of_the_definition(sides):
    def slow(a, b):
        """Of two lists, by the definition."""
        if not a or not b:
            return 0
        return 1 + slow(a[1:], b[1:]) if a[0] == b[0] else max(slow(a[1:], b), slow(a, b[1:]))

    lists = nearest_neighbours(sides[0][:, 0], 7), nearest_neighbours(sides[1][:, 0], 7)
    wanted = [slow(a, b) for a, b in zip(*(x.tolist() for x in lists), strict=True)]
    assert len(set(wanted)) > 2
    assert lcs_knn(*lists) == pytest.approx(sum(wanted) / 60)


def test_svcca_is_the_canonical_correlation_of_scikit_learn(sides):
    x, y = sides[0][:, 0].double(), sides[1][:, 0].double()
    scores = [decomposition.PCA(3).fit_transform(((z - z.mean(0)) / z.std(0)).numpy()) for z in (x, y)]
    a, b = cross_decomposition.CCA(3, max_iter=5000, tol=1e-12).fit_transform(*scores)
    wanted = np.mean([np.corrcoef(a[:, d], b[:, d])[0, 1] for d in range(3)])
    assert svcca(x, y, dim=3) == pytest.approx(wanted, abs=1e-6)
    assert LayerPairs(x[:, None], y[:, None], normalise=False).scores("svcca").item() == pytest.approx(svcca(x, y), abs=1e-5)


def test_hop_metrics_are_those_of_whole_matrices(sides):
    x, y = sides[0][:, 0].double(), sides[1][:, 0].double()
    walks = []
    for z in (x, y):
        z = F.normalize(z, dim=1) - z.mean(dim=0)
        walks.append(torch.exp(z @ z.T / 0.05) / torch.exp(z @ z.T / 0.05).sum(dim=1, keepdim=True))
    powers = [[torch.linalg.matrix_power(w, level) for w in walks] for level in (1, 2, 3)]
    wanted = sum(plain.kernel_cka(p, q, False) for p, q in powers) / 3
    assert hop_cka(x, y) == pytest.approx(wanted, abs=1e-8)
    divergences = [sum(special.rel_entr(m.numpy(), ((p + q) / 2).numpy()).sum() for m in (p, q)) / 2 for p, q in powers]
    assert hop_similarity(x, y) == pytest.approx(np.exp(-sum(d / (i + 1) for i, d in enumerate(divergences)) / 3), rel=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_prefers_the_layer_that_belongs_to_the_other(metric):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(80, 12), dim=1)
    rotated = x @ torch.linalg.qr(torch.randn(12, 12)).Q
    scores = LayerPairs([torch.randn(80, 12), x], [rotated, torch.randn(80, 12)], k=6).scores(metric)
    assert best_pair(scores) == (1, 0)


def test_trustworthiness_is_scikit_learns(sides):
    x, z = sides[0][:, 0], sides[1][:, 1, :2]
    expected = manifold.trustworthiness(x.numpy(), z.numpy(), n_neighbors=4)
    assert trustworthiness(x, z, 4) == pytest.approx(expected, abs=1e-9)
    assert trustworthiness(x, z, 4) == pytest.approx(plain.trustworthiness(x, z, 4), abs=1e-9)


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
