"""Localisation against a slow form in NumPy and SciPy, pixel by pixel where it can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from models.freeze_align.localisation import LocalisationMeter, classes_in, outline


def _enlarged(grid: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with half-pixel centres, written out."""
    out = np.empty((size, size))
    side = len(grid)
    for y in range(size):
        for x in range(size):
            v, u = (np.clip((p + 0.5) * side / size - 0.5, 0, side - 1) for p in (y, x))
            top, left = int(v), int(u)
            bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
            upper = grid[top, left] * (1 - u + left) + grid[top, right] * (u - left)
            lower = grid[bottom, left] * (1 - u + left) + grid[bottom, right] * (u - left)
            out[y, x] = upper * (1 - v + top) + lower * (v - top)
    return out


def test_meter_equals_the_slow_form():
    rng = np.random.default_rng(0)
    meter, images, classes = LocalisationMeter(0.4), [], {}
    for _ in range(4):
        maps = rng.normal(size=(5, 6, 6)).astype(np.float32)
        labels = np.kron(rng.choice([0, 1, 2, 4, 255], (4, 4)), np.ones((8, 8), int))
        meter.add(torch.from_numpy(maps), torch.from_numpy(labels))
        own = []
        for label in (1, 2, 4):
            if (labels == label).any():
                score = _enlarged(maps[label], 32)
                found = (score - score.min()) / (score.max() - score.min()) > 0.4
                own.append(100 * jaccard_score((labels == label).ravel(), found.ravel()))
                classes.setdefault(label, []).append(own[-1])
        if own:
            images.append(np.mean(own))
    result = meter.result()
    assert result.per_image == pytest.approx(np.mean(images), abs=1e-4)
    assert result.per_class == pytest.approx(np.mean([np.mean(values) for values in classes.values()]), abs=1e-4)


def test_masks_that_see_no_name():
    labels = torch.tensor([[0, 1], [2, 2]])
    meter = LocalisationMeter()
    meter.add_mask(torch.ones(2, 2, dtype=torch.bool), labels)
    assert meter.result().per_image == pytest.approx((25 + 50) / 2)
    meter.add_mask(torch.zeros(2, 2, dtype=torch.bool), labels)
    assert meter.result().per_image == pytest.approx((25 + 50) / 4)


def test_background_and_void_are_not_judged():
    labels = torch.tensor([[0, 255], [255, 0]])
    assert classes_in(labels) == []
    meter = LocalisationMeter()
    meter.add(torch.randn(3, 2, 2), labels)
    with pytest.raises(ValueError, match="no image"):
        meter.result()


def test_a_flat_map_outlines_nothing():
    assert not outline(torch.full((3, 3), 2.0), (8, 8), 0.4).any()
