"""CSA against scikit-learn's angles, in chunks, and where there are too few pairs."""

import pytest
import torch

from experiments.benchmarks.reference import structure as plain
from models.errors import UserError
from models.structure.csa import covariances, csa
from tests.golden.structure import refine


def pairs(count=300):
    torch.manual_seed(0)
    image = torch.randn(count, 12) + 5
    return image, image[:, :9] @ torch.randn(9, 9) + torch.randn(count, 9)


def test_correlations_are_those_of_the_decomposed_data_in_any_chunks():
    image, text = pairs()
    maps = csa(covariances(zip(image.split(70), text.split(70), strict=True)), 5)
    torch.testing.assert_close(maps.correlations, plain.csa_correlations(image, text, 5), rtol=1e-4, atol=1e-5)
    outputs = maps.image(image)
    torch.testing.assert_close(outputs.T @ outputs / len(image), torch.eye(5), rtol=1e-3, atol=1e-3)


def test_directions_without_variance_are_left_out():
    image, text = pairs(8)
    with pytest.raises(UserError, match="only 7 directions"):
        csa(covariances([(image, text)]), 8)
    assert torch.isfinite(csa(covariances([(image, text)]), 7).image_map).all()


def test_refining_lowers_the_regulariser():
    from models.losses.structure import structure_loss

    image, text = pairs()
    start = csa(covariances([(image, text)]), 5)
    better = refine(start, image, text, epochs=30, batch_size=100, lr=5e-3)
    before, after = (structure_loss(image - m.mean_image, m.image(image), 1, 0.2) for m in (start, better))
    assert after < before
