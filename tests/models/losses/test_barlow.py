import torch

from experiments.benchmarks.reference import contrastive as reference
from models.losses.barlow import BarlowTwinsLoss


def test_barlow_twins_entry_by_entry():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    out = BarlowTwinsLoss(off_diagonal_weight=0.3)(image, [text], torch.ones(1), torch.zeros(1))
    torch.testing.assert_close(out.losses["contrastive"], reference.barlow_twins(image, text, 0.3))
