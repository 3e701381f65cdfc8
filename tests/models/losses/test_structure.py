"""The regulariser against its definition, its margin, its warm-up and what must have no gradient."""

import pytest
import torch

from experiments.benchmarks.reference import structure as plain
from models.losses.structure import StructureRegulariser, structure_loss
from models.sizes import Tile


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(30, 9, generator=generator, dtype=torch.float64)
    return original, torch.randn(30, 5, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("divergence", ["js", "reversed"])
@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("weighting", ["none", "inverse"])
def test_value_and_gradient_are_those_of_the_definition(divergence, levels, weighting):
    original, aligned = features()
    options = {"levels": levels, "weighting": weighting, "divergence": divergence, "temperature": 0.1}
    value, expected = structure_loss(original, aligned, **options), plain.structure_loss(original, aligned, **options)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)
    (found,) = torch.autograd.grad(3 * value, aligned)
    (wanted,) = torch.autograd.grad(3 * expected, aligned)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_margin_frees_levels_that_differ_little():
    original, aligned = features()
    base = structure_loss(original, aligned, levels=1)
    assert structure_loss(original, aligned, levels=1, margin=2 * float(base)).item() == 0
    half = structure_loss(original, aligned, levels=1, margin=float(base) / 2)
    torch.testing.assert_close(half, base / 2)


def test_rows_in_chunks_give_the_same(monkeypatch):
    original, aligned = features()
    whole = structure_loss(original, aligned, levels=3)
    monkeypatch.setattr("models.losses.structure.WALKS", Tile(7 * 30, 24))
    torch.testing.assert_close(structure_loss(original, aligned, levels=3), whole)


def test_identical_neighbourhoods_cost_nothing():
    original, _ = features()
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    assert structure_loss(original, 3 * original @ rotation).item() == pytest.approx(0, abs=1e-9)


def test_weight_grows_in_training_and_is_full_in_validation():
    original, aligned = features()
    regulariser = StructureRegulariser(weight=10, warmup_steps=4)
    assert regulariser([(original, aligned)], 0) is None
    assert regulariser([(original, aligned)], 2).report["structure_weight"] == 5
    assert regulariser.eval()([(original, aligned)], 2).report["structure_weight"] == 10
    official = StructureRegulariser(weight=10, warmup_steps=4, validation_weight="current").eval()
    assert official([(original, aligned)], 2).report["structure_weight"] == 5


def test_reduction_over_modalities():
    pairs = [features(0), features(1)]
    mean, total = (StructureRegulariser(warmup_steps=0, reduction=r)(pairs, 0).loss for r in ("mean", "sum"))
    torch.testing.assert_close(total, 2 * mean)


def test_extra_samples_join_the_batch_or_stand_in_its_place():
    batch, extra = features(0), features(1)
    joined = StructureRegulariser(warmup_steps=0).with_extra(batch, extra)
    whole = torch.cat([batch[0], extra[0]]), torch.cat([batch[1], 7 * extra[1]])  # a row's length means nothing
    torch.testing.assert_close(structure_loss(*joined), structure_loss(*whole).float(), rtol=1e-5, atol=1e-7)
    assert StructureRegulariser(extra="replace").with_extra(batch, extra) is extra
