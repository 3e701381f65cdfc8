"""Augmentations that can be said in a line, and their determinism."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from datamodules.transforms.augment import (
    OPERATIONS,
    PHOTOMETRIC,
    AugmentedCrop,
    RandomAugment,
    _warp,
    apply_operation,
    auto_contrast,
    brightness,
    equalize,
    random_box,
    rotate,
    sharpness,
    translate_x,
    translate_y,
)
from models.encoders.preprocess import ImagePreprocess

IMAGE = np.random.default_rng(0).integers(10, 200, (24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_shape_and_type(name):
    out = apply_operation(name, IMAGE, 0.7)
    assert out.shape == IMAGE.shape and out.dtype == np.uint8
    assert (name == "Identity") == np.array_equal(out, IMAGE)


def test_translation_moves_whole_pixels_and_fills():
    out = translate_x(IMAGE, 5)
    np.testing.assert_array_equal(out[:, :-5], IMAGE[:, 5:])  # the official sign: to the left
    assert (out[:, -5:] == 128).all()


@pytest.mark.parametrize("pixels", [-40, -7, 0, 3, 32])
def test_moving_by_whole_pixels_is_the_warp(pixels):
    along = _warp(IMAGE, np.array([[1, 0, -pixels], [0, 1, 0]]))
    down = _warp(IMAGE, np.array([[1, 0, 0], [0, 1, -pixels]]))
    np.testing.assert_array_equal(translate_x(IMAGE, float(pixels)), along)
    np.testing.assert_array_equal(translate_y(IMAGE, float(pixels)), down)


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


def test_photometric_operations_move_no_pixel():
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 200
    augment = RandomAugment(PHOTOMETRIC, probability=1.0)
    for seed in range(20):
        out = augment(half, np.random.default_rng(seed))
        assert (out[:, :6] == out[0, 0]).all() and (out[:, 10:] == out[0, 15]).all()  # a blur reaches two pixels


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(10, 220, (12, 9, 3), dtype=np.uint8)


def test_auto_contrast_and_its_overflow(image):
    own = auto_contrast(image).astype(int)
    assert own.min() == 0 and own.max() == 255
    assert np.abs(own - np.asarray(ImageOps.autocontrast(Image.fromarray(image))).astype(int)).max() <= 1
    assert (auto_contrast(image, overflow=True) == 255).all()
    image[0, 0] = 0
    assert (auto_contrast(image, overflow=True) == auto_contrast(image)).all()
    flat = np.full((4, 4, 3), 7, np.uint8)
    assert (auto_contrast(flat, overflow=True) == flat).all()


def test_equalize_equals_pillow(image):
    image = np.repeat(np.repeat(image, 8, 0), 8, 1)
    assert (equalize(image) == np.asarray(ImageOps.equalize(Image.fromarray(image)))).all()


def test_sharpness_clips_or_wraps():
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 250
    assert sharpness(image, 1.36)[2, 2, 0] == 255
    assert sharpness(image, 1.36, overflow=True)[2, 2, 0] == 305 - 256  # 96 + 1.36 (250 - 96), whose last byte stays
    assert (sharpness(image, 1.0) == image).all()
    assert (brightness(image, 1.36) == np.clip(image * 1.36, 0, 255).astype(np.uint8)).all()


def test_random_box_is_drawn_like_torchvision():
    """Same distribution of the crop's area, shape and place; both fall back to the centre where nothing fits."""
    size = (60, 44)
    rng = np.random.default_rng(0)
    ours = np.array([random_box(*size, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(4000)], float)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2] <= 60).all() and (ours[:, 3] <= 44).all()
    blank = torch.zeros(3, 44, 60)
    torch.manual_seed(0)
    drawn = [transforms.RandomResizedCrop.get_params(blank, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    theirs = np.array([(left, top, left + width, top + height) for top, left, height, width in drawn], float)
    for measure in (
        lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) / (60 * 44),
        lambda b: np.log((b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
    for wide in ((100, 10), (10, 100)):
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            torch.zeros(3, wide[1], wide[0]), (2, 2), (3 / 4, 4 / 3)
        )
        assert random_box(*wide, (2, 2), (3 / 4, 4 / 3), rng) == (left, top, left + width, top + height)


def test_crop_is_torchvision_s_crop():
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (44, 60, 3), dtype=np.uint8))
    left, top, right, bottom = random_box(60, 44, (0.2, 1.0), (3 / 4, 4 / 3), np.random.default_rng(3))
    cropped = transforms.functional.resized_crop(
        picture, top, left, bottom - top, right - left, [16, 16], transforms.InterpolationMode.BICUBIC
    )
    wanted = transforms.functional.normalize(
        transforms.functional.to_tensor(cropped), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    )
    found = AugmentedCrop(flip_probability=0)(picture, ImagePreprocess((16, 16), None), np.random.default_rng(3))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
