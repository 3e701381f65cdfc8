"""Augmentations that can be said in a line, and their determinism."""

import numpy as np
import pytest
from PIL import Image

from datamodules.augment import OPERATIONS, RandomAugment, apply_operation, auto_contrast, rotate, translate_x

IMAGE = np.random.default_rng(0).integers(10, 200, (24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_shape_and_type(name):
    out = apply_operation(name, IMAGE, 0.7)
    assert out.shape == IMAGE.shape and out.dtype == np.uint8
    assert (name == "Identity") == np.array_equal(out, IMAGE)


def test_contrast_is_stretched_unless_it_overflows():
    assert auto_contrast(IMAGE).min() == 0 and auto_contrast(IMAGE).max() >= 254
    assert (auto_contrast(IMAGE, overflow=True) == 255).all()


def test_translation_moves_whole_pixels_and_fills():
    out = translate_x(IMAGE, 5)
    np.testing.assert_array_equal(out[:, :-5], IMAGE[:, 5:])  # the official sign: to the left
    assert (out[:, -5:] == 128).all()


def test_rotation_turns_like_pil():
    smooth = np.asarray(Image.fromarray(IMAGE).resize((8, 6)).resize((32, 24), Image.Resampling.BICUBIC))
    ours = rotate(smooth, 90).astype(int)
    theirs = np.asarray(Image.fromarray(smooth).rotate(90, Image.Resampling.BILINEAR, center=(16, 12))).astype(int)
    middle = np.abs(ours - theirs)[4:20, 8:24]
    assert np.median(middle) <= 12  # PIL counts pixel centres from a half


def test_the_draw_is_a_function_of_the_generator():
    augment = RandomAugment()
    first, again = (augment(IMAGE, np.random.default_rng((1, 2, 3))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    others = [augment(IMAGE, np.random.default_rng((1, 2, row))) for row in range(8)]
    assert any(not np.array_equal(first, other) for other in others)
