"""Which frames are taken and what becomes of their pixels, beyond the reference files."""

import numpy as np
import pytest
import torch

from datamodules.readers.base import BadSample
from datamodules.transforms.frame_sampling import random_bounds, sample_frames
from datamodules.transforms.video import ClipTransform, crop_clip


def test_random_frames_stay_in_their_segments():
    rng = np.random.default_rng(0)
    drawn = np.stack([sample_frames(3, 10, rng) for _ in range(300)])
    assert [set(column) for column in drawn.T] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8, 9}]
    official = np.stack([sample_frames(3, 10, rng, official="all_in_one") for _ in range(300)])
    assert [set(column) for column in official.T] == [{0, 1}, {3, 4}, {6, 7, 8}]


def test_short_clips_are_refused():
    with pytest.raises(BadSample):
        sample_frames(4, 3)
    with pytest.raises(BadSample):
        random_bounds(3, 4, official=True)
    assert sample_frames(4, 4).tolist() == [0, 1, 2, 3]


def test_crop_is_shared_and_covers_the_picture():
    clip = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    assert np.array_equal(crop_clip(clip, 4, (0.0, 0.0)), clip[:, :4, :4])
    assert np.array_equal(crop_clip(clip, 4, (0.999, 0.999)), clip[:, 4:, 4:])
    assert np.array_equal(crop_clip(clip, 4), clip[:, 2:6, 2:6])


def test_augmentation_repeats_and_mirrors():
    clip = np.random.default_rng(0).integers(0, 255, (2, 30, 40, 3), dtype=np.uint8)
    transform = ClipTransform(16, largest_ratio=1.5, flip=True, rand_augment=9)
    draws = [transform(clip, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (2, 3, 16, 16)
    ramp = np.broadcast_to(np.arange(0, 250, 5, dtype=np.uint8)[None, None, :, None], (1, 50, 50, 3))
    slopes = {bool(ClipTransform(16, flip=True)(ramp, np.random.default_rng(s))[0, 0, 0].diff().sum() > 0) for s in range(20)}
    assert slopes == {True, False}
