import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from experiments.benchmarks.reference import ranking
from models.metrics.knn import knn_votes


def features(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (rows,), generator=generator)
    means = torch.randn(5, 8, generator=torch.Generator().manual_seed(99))
    return F.normalize(torch.randn(rows, 8, generator=generator).double() + means[labels], dim=-1), labels


@pytest.mark.parametrize("tile_entries", [1, 10**6])
def test_votes_equal_the_definition(tile_entries):
    (train, labels), (test, _) = features(60, 0), features(20, 1)
    votes = knn_votes(train, labels, test, 5, k=7, temperature=0.07, tile_entries=tile_entries)
    wanted = ranking.knn_votes(train.numpy(), labels.numpy(), test.numpy(), 5, 7, 0.07)
    torch.testing.assert_close(votes, torch.from_numpy(wanted))


def test_predictions_equal_scikit_learn():
    (train, labels), (test, _) = features(80, 2), features(40, 3)
    # For unit vectors the squared distance d2 is 2 - 2 cos.
    model = KNeighborsClassifier(9, weights=lambda distance: torch.exp(torch.tensor(1 - distance**2 / 2) / 0.07).numpy())
    wanted = model.fit(train.numpy(), labels.numpy()).predict(test.numpy())
    assert knn_votes(train, labels, test, 5, k=9).argmax(dim=1).tolist() == wanted.tolist()


def test_fewer_rows_than_neighbours():
    (train, labels), (test, _) = features(3, 4), features(4, 5)
    assert (knn_votes(train, labels, test, 5, k=20) > 0).sum(dim=1).max() <= 3
