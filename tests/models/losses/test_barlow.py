import pytest
import torch

from experiments.benchmarks.reference import contrastive as reference
from models.losses.barlow import BarlowTwinsLoss, barlow_twins


@pytest.fixture
def sides():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_barlow_twins_entry_by_entry(sides):
    image, text = sides
    out = BarlowTwinsLoss(off_diagonal_weight=0.3)(image, [text], torch.ones(1), torch.zeros(1))
    torch.testing.assert_close(out.losses["contrastive"], reference.barlow_twins(image, text, 0.3))


def test_shift_scale_and_order_of_the_batch_change_nothing(sides):
    image, text = sides
    moved = 3 * image[[5, 0, 4, 1, 3, 2]] - 2, 0.1 * text[[5, 0, 4, 1, 3, 2]] + 7
    torch.testing.assert_close(barlow_twins(*moved), barlow_twins(image, text))


def test_decorrelated_equal_sides_have_the_smallest_loss():
    image = torch.linalg.qr(torch.randn(50, 5, dtype=torch.float64) - 0.0).Q
    image = torch.linalg.qr(image - image.mean(0)).Q
    # The mean is over B, the deviation over B - 1, hence the diagonal of C is (B - 1) / B.
    assert float(barlow_twins(image, image)) == pytest.approx(5 * (1 / 50) ** 2)
    assert float(barlow_twins(image, image.roll(1, dims=1))) > 1
