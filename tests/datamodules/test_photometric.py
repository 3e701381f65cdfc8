import numpy as np
import pytest
from PIL import Image, ImageOps

from datamodules.photometric import PhotometricAugment, auto_contrast, brightness, equalize, sharpness


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


def test_drawing_depends_on_the_generator_alone(image):
    augment = PhotometricAugment()
    first, again = (augment(image, np.random.default_rng(5)) for _ in range(2))
    assert (first == again).all()
    assert any((augment(image, np.random.default_rng(seed)) != image).any() for seed in range(8))
