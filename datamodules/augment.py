"""RandAugment of freeze-align, ALBEF and their descendants: ten operations on uint8 images, drawn by (seed, epoch, row).

Every operation takes and gives (H, W, 3) uint8 (specification of freeze-align, section 4.3). In the official code two of
them overflow: the stretch of AutoContrast negates an unsigned byte, which turns every image white whose darkest value is
not 0, and Sharpness wraps what leaves [0, 255]. ``overflow=True`` reproduces both.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps

FILL = (128, 128, 128)
MAX_LEVEL = 10


def auto_contrast(image: np.ndarray, overflow: bool = False) -> np.ndarray:
    """Each channel stretched from its minimum and maximum to 0 and 255 by a table of truncated values."""
    out = np.empty_like(image)
    for channel in range(3):
        plane = image[..., channel]
        low, high = int(plane.min()), int(plane.max())
        if high <= low:
            out[..., channel] = plane
            continue
        scale = 255 / (high - low)
        offset = -low % 256 if overflow else -low
        out[..., channel] = np.clip(np.arange(256) * scale + offset * scale, 0, 255).astype(np.uint8)[plane]
    return out


def equalize(image: np.ndarray) -> np.ndarray:
    """A flat histogram per channel, as PIL does it."""
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(image.astype(np.float32) * factor, 0, 255).astype(np.uint8)


def sharpness(image: np.ndarray, factor: float, overflow: bool = False) -> np.ndarray:
    """Away from a blurred copy by ``factor``; the one-pixel border stays."""
    pixels = image.astype(np.float32)
    blurred = 5 * pixels[1:-1, 1:-1]
    for dy in range(3):
        for dx in range(3):
            if (dy, dx) != (1, 1):
                blurred = blurred + pixels[dy : dy + pixels.shape[0] - 2, dx : dx + pixels.shape[1] - 2]
    blurred = np.rint(blurred / 13)
    out = image.copy()
    inner = blurred + factor * (pixels[1:-1, 1:-1] - blurred)
    out[1:-1, 1:-1] = (inner if overflow else np.clip(inner, 0, 255)).astype(np.int32).astype(np.uint8)
    return out


def shear_x(image: np.ndarray, amount: float) -> np.ndarray:
    return _warp(image, np.array([[1, amount, 0], [0, 1, 0]]))


def shear_y(image: np.ndarray, amount: float) -> np.ndarray:
    return _warp(image, np.array([[1, 0, 0], [amount, 1, 0]]))


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    return _warp(image, np.array([[1, 0, -pixels], [0, 1, 0]]))


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    return _warp(image, np.array([[1, 0, 0], [0, 1, -pixels]]))


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Counter-clockwise about (W / 2, H / 2)."""
    height, width = image.shape[:2]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return _warp(image, np.array([[cosine, sine, (1 - cosine) * x - sine * y], [-sine, cosine, sine * x + (1 - cosine) * y]]))


def _warp(image: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """Bilinear warp by the 2 x 3 matrix from source to target coordinates (x, y); outside is FILL."""
    height, width = image.shape[:2]
    inverse = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))
    y, x = np.mgrid[:height, :width].astype(np.float64)
    source_x = inverse[0, 0] * x + inverse[0, 1] * y + inverse[0, 2]
    source_y = inverse[1, 0] * x + inverse[1, 1] * y + inverse[1, 2]
    padded = np.empty((height + 2, width + 2, 3))
    padded[...] = FILL
    padded[1:-1, 1:-1] = image
    left, top = np.floor(source_x), np.floor(source_y)
    right_share, bottom_share = (source_x - left)[..., None], (source_y - top)[..., None]

    def at(dy: int, dx: int) -> np.ndarray:
        row = np.clip(top + dy + 1, 0, height + 1).astype(np.intp)
        column = np.clip(left + dx + 1, 0, width + 1).astype(np.intp)
        return padded[row, column]

    upper = at(0, 0) * (1 - right_share) + at(0, 1) * right_share
    lower = at(1, 0) * (1 - right_share) + at(1, 1) * right_share
    return np.rint(upper * (1 - bottom_share) + lower * bottom_share).astype(np.uint8)


OPERATIONS = (
    "Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
)  # fmt: skip
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


def apply_operation(name: str, image: np.ndarray, level: float, overflow: bool = False) -> np.ndarray:
    """One of :data:`OPERATIONS` at strength ``level`` in [-1, 1], of which only those in :data:`SIGNED` have a sign."""
    enhance = 1.8 * level + 0.1
    match name:
        case "AutoContrast":
            return auto_contrast(image, overflow)
        case "Equalize":
            return equalize(image)
        case "Brightness":
            return brightness(image, enhance)
        case "Sharpness":
            return sharpness(image, enhance, overflow)
        case "ShearX":
            return shear_x(image, 0.3 * level)
        case "ShearY":
            return shear_y(image, 0.3 * level)
        case "TranslateX":
            return translate_x(image, 10 * level)
        case "TranslateY":
            return translate_y(image, 10 * level)
        case "Rotate":
            return rotate(image, 30 * level)
        case "Identity":
            return image
    raise ValueError(f"unknown operation '{name}'; choose of {', '.join(OPERATIONS)}")


class RandomAugment:
    """``count`` operations drawn with replacement, each applied with probability ``probability``.

    Args:
        count, level: how many and how strong (of 10); official: 2 and 7.
        overflow: see above.
    """

    def __init__(self, count: int = 2, level: int = 7, probability: float = 0.5, overflow: bool = False):
        self.count, self.level, self.probability, self.overflow = count, level / MAX_LEVEL, probability, overflow

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 to the same; all chance comes from ``rng``."""
        for name in rng.choice(OPERATIONS, size=self.count):
            applied, positive = rng.random(2) < (self.probability, 0.5)
            if applied:
                level = self.level if positive or name not in SIGNED else -self.level
                image = apply_operation(str(name), image, level, self.overflow)
        return image
