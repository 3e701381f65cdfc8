"""Segmentation heads on frozen patch features."""

import pytest
import torch

from models.batch import VOID_LABEL
from models.metrics.dice import dice_of_masks, dice_per_class
from models.rad_dino.backbone import DinoViT
from models.rad_dino.segmentation import (
    LinearSegmentation,
    PyramidSegmentation,
    patch_maps,
    segmentation_loss,
    train_segmentation,
)


def overlapping(count=24):
    """Maps (N, 8, 4, 4) whose first two channels say which of two overlapping structures a patch belongs to, and the masks."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(count, 2, 4, 4, generator=generator) < 0.5
    maps = torch.cat([inside.float(), torch.randn(count, 6, 4, 4, generator=generator)], dim=1)
    return maps, inside.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).to(torch.uint8)


@pytest.mark.parametrize(("head", "lr"), [(LinearSegmentation(8, 2), 0.1), (PyramidSegmentation(8, 2, channels=8), 3e-3)])
def test_heads_learn_structures_that_overlap(head, lr):
    maps, masks = overlapping()
    trained = train_segmentation(head, maps.half(), masks, steps=120, lr=lr)
    assert not trained.training
    predicted = trained(maps, (16, 16)) > 0
    assert predicted.shape == masks.shape
    assert dice_per_class(dice_of_masks(predicted, masks == 1)).min() > 0.75  # edges between patches are blurred


def test_unknown_masks_do_not_count():
    maps, masks = overlapping(4)
    logits = torch.randn(masks.shape, generator=torch.Generator().manual_seed(1))
    alone = segmentation_loss(logits[:2, :1], masks[:2, :1])
    masks[2:] = VOID_LABEL
    masks[:, 1] = VOID_LABEL
    torch.testing.assert_close(segmentation_loss(logits, masks), alone)
    assert segmentation_loss(logits, torch.full_like(masks, VOID_LABEL)) == 0


def test_dice_of_masks():
    a, b = torch.zeros(1, 2, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    a[0, 0, 0], b[0, 0, :, 0] = True, True
    scores = dice_of_masks(a, b)
    assert scores[0, 0] == 0.5 and scores[0, 1].isnan()


def test_maps_are_row_by_row():
    encoder = DinoViT(16, 4, 12, 1, 2).eval()
    images = torch.randn(2, 3, 8, 12)
    maps = patch_maps(encoder, images)
    assert maps.shape == (2, 12, 2, 3)
    torch.testing.assert_close(maps[:, :, 1, 2], encoder(images).patches[:, 5])
