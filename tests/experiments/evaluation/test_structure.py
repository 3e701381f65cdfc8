"""STRUCTURE's suites: the official protocol of retrieval, and neighbourhoods that maps keep or lose."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from sklearn.manifold import trustworthiness as of_scikit_learn
from sklearn.metrics import average_precision_score

from experiments.evaluation.base import EmbeddedSplit
from experiments.evaluation.structure import neighbourhoods, row_retrieval


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    image, owner = torch.randn(30, 6, generator=generator), torch.arange(30).repeat_interleave(3)
    text = image[owner] + torch.randn(90, 6, generator=generator)
    return EmbeddedSplit(image, text, owner, [""] * 90, encode_text=None, load_image=None)


def test_rows_of_an_image_are_candidates_each(split):
    found = row_retrieval(split, ks=(1, 90))
    scores = F.normalize(split.text, dim=1) @ F.normalize(split.image, dim=1).T
    rows = scores[:, split.owner]  # three equal candidates an image
    right = split.owner[:, None] == split.owner[None, :]
    first = torch.stack([right[i, rows[i].argmax()] for i in range(90)])
    assert found.metrics["row_retrieval/t2i_recall@1"] == pytest.approx(100 * first.double().mean().item())
    # Over the whole list MAP is the average precision of image-to-text, where there are no equal scores.
    wanted = [average_precision_score(right[i].numpy(), rows.T[i].numpy()) for i in range(90)]
    assert found.metrics["row_retrieval/i2t_map@90"] == pytest.approx(100 * sum(wanted) / 90)
    assert found.metrics["row_retrieval/i2t_precision@90"] == pytest.approx(100 * 3 / 90)
    assert found.baselines["chance"]["row_retrieval/i2t_recall@1"] == pytest.approx(100 * 3 / 90)


def test_neighbourhoods_are_scikit_learns_and_a_rotation_keeps_them(split):
    generator = torch.Generator().manual_seed(1)
    frozen = torch.randn(30, 8, generator=generator), torch.randn(90, 6, generator=generator)
    rotated = 3 * frozen[1] @ torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    split = dataclasses.replace(split, text=rotated, frozen=lambda: frozen)
    found = neighbourhoods(split, k=4)
    before, after = (F.normalize(x, dim=1).numpy() for x in (frozen[0], split.image))
    wanted = 100 * of_scikit_learn(before, after, n_neighbors=4)
    assert found.metrics["neighbourhoods/image_trustworthiness"] == pytest.approx(wanted, abs=1e-7)
    assert found.metrics["neighbourhoods/image_continuity"] == pytest.approx(
        100 * of_scikit_learn(after, before, n_neighbors=4)
    )
    assert found.metrics["neighbourhoods/text_trustworthiness"] == 100 == found.metrics["neighbourhoods/text_continuity"]
    assert wanted < 70 < found.baselines["random map"]["neighbourhoods/image_trustworthiness"] < 100


def test_a_head_of_single_tokens_has_no_frozen_vectors(split):
    assert not neighbourhoods(split).metrics and "left out" in neighbourhoods(split).notes[0]
