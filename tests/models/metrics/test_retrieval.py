import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.benchmarks.reference import ranking
from models.metrics.retrieval import chance_recall_at, recall_at, retrieval_ranks, validation_retrieval


def ragged_pool(seed: int):
    """Images with one to four texts each, in no order."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.arange(23).repeat_interleave(torch.randint(1, 5, (23,), generator=generator))
    owner = owner[torch.randperm(len(owner), generator=generator)]
    image = torch.randn(23, 6, generator=generator)
    text = torch.randn(len(owner), 6, generator=generator) + image[owner]
    return image, text, owner


def reference(image, text, owner):
    scores = (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).numpy()
    texts_of = [set(np.flatnonzero(owner.numpy() == i).tolist()) for i in range(len(image))]
    return ranking.retrieval_ranks(scores, texts_of), ranking.retrieval_ranks(scores.T, [{int(i)} for i in owner])


@pytest.mark.parametrize("tile_entries", [1, 100, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_equal_a_full_sort(seed, tile_entries):
    image, text, owner = ragged_pool(seed)
    i2t, t2i = retrieval_ranks(image, text, owner, tile_entries)
    wanted_i2t, wanted_t2i = reference(image, text, owner)
    assert i2t.tolist() == wanted_i2t and t2i.tolist() == wanted_t2i


def test_ties_go_to_the_earlier_candidate():
    """One-hot embeddings: every score is exactly 0 or 1, so that nearly all candidates are tied."""
    image = F.one_hot(torch.tensor([0, 1, 0, 2, 1, 0]), 3).float()
    owner = torch.tensor([5, 0, 3, 1, 2, 4, 0, 3, 5])
    text = F.one_hot(torch.tensor([0, 1, 2, 1, 0, 2, 0, 2, 1]), 3).float()
    i2t, t2i = retrieval_ranks(image, text, owner)
    wanted_i2t, wanted_t2i = reference(image, text, owner)
    assert i2t.tolist() == wanted_i2t and t2i.tolist() == wanted_t2i


def test_constant_embeddings_are_at_chance():
    i2t, t2i = retrieval_ranks(torch.ones(10, 4), torch.ones(10, 4), torch.arange(10))
    assert i2t.tolist() == t2i.tolist() == list(range(10))


def test_nan_embeddings_rank_last():
    image, text, owner = ragged_pool(0)
    i2t, t2i = retrieval_ranks(image * float("nan"), text, owner)
    assert (i2t == len(text) - 1).all() and (t2i == len(image) - 1).all()


@pytest.mark.parametrize("owner", [[0, 0, 1], [0, 1, 3], [0, 1]])
def test_images_without_texts_and_texts_without_images(owner):
    with pytest.raises(ValueError, match="texts"):
        retrieval_ranks(torch.ones(3, 2), torch.ones(3, 2), torch.tensor(owner))


def test_recall_and_its_chance():
    assert recall_at(torch.tensor([0, 4, 5, 9]), 5) == 50.0
    assert chance_recall_at(10, 1000) == pytest.approx(1.0)
    assert chance_recall_at(1, 4, 4) == 100.0
    # Drawing 2 of 5 with 2 right ones misses both in 3 of 10 cases.
    assert chance_recall_at(2, 5, 2) == pytest.approx(70.0)
    assert chance_recall_at(2, 5, torch.tensor([1, 2])) == pytest.approx((40 + 70) / 2)


def test_validator_signs():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    text = torch.tensor([[1.0, -1.0], [-1.0, -1.0], [1.0, 0.5]])
    cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    metrics = validation_retrieval(image, text, ks=(1, 2))
    assert metrics["positive_accuracy"] == pytest.approx((cosines.diagonal() > 0).double().mean().item())
    off = cosines[~torch.eye(3, dtype=torch.bool)]
    assert metrics["negative_accuracy"] == pytest.approx((off < 0).double().mean().item())
    assert metrics["mean_recall"] == pytest.approx(
        np.mean([metrics[f"{way}_recall@{k}"] for way in ("i2t", "t2i") for k in (1, 2)])
    )
