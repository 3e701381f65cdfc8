"""RandAugment (arXiv 1909.13719) with Pillow's operations, as CLIP-based fine-tuning recipes use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREATEST = 30  # magnitude that reaches an operation's upper bound


class Operation(NamedTuple):
    """``apply(image, value)``; value between ``low`` and ``high``, with a random sign where ``signed``."""

    apply: Callable[[Image.Image, float], Image.Image]
    low: float
    high: float
    signed: bool = False


def _affine(coefficients: Callable[[float, Image.Image], tuple[float, ...]]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, value: image.transform(image.size, Image.Transform.AFFINE, coefficients(value, image))


def _enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, value: kind(image).enhance(value)


def _solarize_add(image: Image.Image, value: float) -> Image.Image:
    """Adds ``value`` to what is darker than 128."""
    pixels = np.asarray(image).astype(np.int64)
    return Image.fromarray(np.where(pixels < 128, np.clip(pixels + int(value), 0, 255), pixels).astype(np.uint8))


OPERATIONS = {
    "AutoContrast": Operation(lambda image, _: ImageOps.autocontrast(image), 0, 1),
    "Equalize": Operation(lambda image, _: ImageOps.equalize(image), 0, 1),
    "Rotate": Operation(lambda image, value: image.rotate(value), 0, 30, signed=True),
    "Posterize": Operation(lambda image, value: ImageOps.posterize(image, max(1, int(value))), 0, 4),
    "Solarize": Operation(lambda image, value: ImageOps.solarize(image, int(value)), 0, 256),
    "SolarizeAdd": Operation(_solarize_add, 0, 110),
    "Color": Operation(_enhance(ImageEnhance.Color), 0.1, 1.9),
    "Contrast": Operation(_enhance(ImageEnhance.Contrast), 0.1, 1.9),
    "Brightness": Operation(_enhance(ImageEnhance.Brightness), 0.1, 1.9),
    "Sharpness": Operation(_enhance(ImageEnhance.Sharpness), 0.1, 1.9),
    "ShearX": Operation(_affine(lambda value, _: (1, value, 0, 0, 1, 0)), 0, 0.3, signed=True),
    "ShearY": Operation(_affine(lambda value, _: (1, 0, 0, value, 1, 0)), 0, 0.3, signed=True),
    "TranslateX": Operation(_affine(lambda value, _: (1, 0, value, 0, 1, 0)), 0, 100, signed=True),
    "TranslateY": Operation(_affine(lambda value, _: (1, 0, 0, 0, 1, value)), 0, 100, signed=True),
}


class RandAugment:
    """``count`` operations drawn with replacement, all applied, at one magnitude.

    Args:
        count: of operations.
        magnitude: of 30, which is linear in each operation's value between its bounds.
    """

    def __init__(self, count: int = 2, magnitude: float = 9):
        self.count, self.magnitude = count, magnitude

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 to the same; all chance comes from ``rng``."""
        out = Image.fromarray(image)
        for name in rng.choice(list(OPERATIONS), size=self.count):
            operation = OPERATIONS[str(name)]
            value = operation.low + self.magnitude / GREATEST * (operation.high - operation.low)
            if operation.signed and rng.random() < 0.5:
                value = -value
            out = operation.apply(out, value)
        return np.array(out)
