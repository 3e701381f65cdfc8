"""RandAugment of freeze-align, ALBEF, DGM4 and their kin: operations on uint8 images, drawn by (seed, epoch, row).

Every operation takes and gives (H, W, 3) uint8 (``dataset/randaugment.py`` of the official code). In the official code two of
them overflow: the stretch of AutoContrast negates an unsigned byte, which turns every channel white whose darkest value is
not 0, and Sharpness wraps what leaves [0, 255]. ``overflow=True`` reproduces either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from models.encoders.preprocess import ImagePreprocess
from models.errors import UserError

FILL = (128, 128, 128)
MAX_LEVEL = 10
LUMA = np.array([0.114, 0.587, 0.299], np.float32)


def auto_contrast(image: np.ndarray, overflow: bool = False) -> np.ndarray:
    """Stretches each channel to 0..255. See :class:`RandomAugment` for ``overflow``."""
    channels = []
    for channel in np.moveaxis(image, -1, 0):
        low, high = int(channel.min()), int(channel.max())
        if high > low:
            scale = 255 / (high - low)
            negated = (256 - low) % 256 if overflow else -low  # an unsigned byte has no negative
            channel = np.clip(np.arange(256) * scale + negated * scale, 0, 255).astype(np.uint8)[channel]
        channels.append(channel)
    return np.stack(channels, axis=-1)


def equalize(image: np.ndarray) -> np.ndarray:
    """Evens out the histogram of each channel."""
    channels = []
    for channel in np.moveaxis(image, -1, 0):
        counts = np.bincount(channel.ravel(), minlength=256)
        step = counts[counts != 0][:-1].sum() // 255
        if step:
            sums = np.cumsum(np.concatenate([[step // 2], counts[:-1]]))
            channel = np.clip(sums // step, 0, 255).astype(np.uint8)[channel]
        channels.append(channel)
    return np.stack(channels, axis=-1)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies by ``factor``, clipped."""
    return np.clip(np.arange(256, dtype=np.float32) * factor, 0, 255).astype(np.uint8)[image]


def sharpness(image: np.ndarray, factor: float, overflow: bool = False) -> np.ndarray:
    """Away from a 3x3 blur by ``factor``; the outermost pixels stay. See :class:`RandomAugment` for ``overflow``."""
    if min(image.shape[:2]) < 3:
        return image
    height, width = image.shape[:2]
    wide = image.astype(np.float64)
    around = sum(wide[dy : height - 2 + dy, dx : width - 2 + dx] for dy in range(3) for dx in range(3))
    centre = wide[1:-1, 1:-1]
    blurred = np.rint((around + 4 * centre) / 13).astype(np.float32)  # the kernel has 5 in its centre
    sharp = blurred + np.float32(factor) * (centre.astype(np.float32) - blurred)
    out = image.copy()
    out[1:-1, 1:-1] = (sharp.astype(np.int64) & 255) if overflow else np.clip(sharp, 0, 255)
    return out


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts what is at least ``threshold``."""
    values = np.arange(256)
    return np.where(values < threshold, values, 255 - values).astype(np.uint8)[image]


def colour(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from the grey image by ``factor``, whose weights for red and blue are swapped (official)."""
    grey = image.astype(np.float32) @ LUMA
    return np.clip(grey[..., None] + factor * (image - grey[..., None]), 0, 255).astype(np.uint8)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean grey by ``factor``, with the weights of :func:`colour`."""
    mean = image.mean(axis=(0, 1)) @ LUMA
    return np.clip((np.arange(256) - mean) * factor + mean, 0, 255).astype(np.uint8)[image]


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the upper ``bits`` of every value."""
    return image & np.uint8((255 << (8 - bits)) & 255)


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    """To the left, for positive ``pixels``, as officially."""
    if float(pixels).is_integer():  # as the official strength is
        return _moved_left(image, int(pixels))
    return _warp(image, np.array([[1, 0, -pixels], [0, 1, 0]]))


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    """Upwards, for positive ``pixels``, as officially."""
    if float(pixels).is_integer():
        return _moved_left(image.transpose(1, 0, 2), int(pixels)).transpose(1, 0, 2)
    return _warp(image, np.array([[1, 0, 0], [0, 1, -pixels]]))


def _moved_left(image: np.ndarray, pixels: int) -> np.ndarray:
    out = np.empty_like(image)
    out[...] = FILL
    width = image.shape[1]
    if abs(pixels) < width:
        out[:, max(-pixels, 0) : width - max(pixels, 0)] = image[:, max(pixels, 0) : width - max(-pixels, 0)]
    return out


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


def apply_operation(
    name: str, image: np.ndarray, level: float, autocontrast_overflow: bool = False, sharpness_overflow: bool = False
) -> np.ndarray:
    """One of :data:`WITH_COLOUR` at strength ``level`` in [-1, 1], of which only those in :data:`SIGNED` have a sign."""
    overflow = {"AutoContrast": autocontrast_overflow, "Sharpness": sharpness_overflow}.get(name)
    return WITH_COLOUR[name](image, level) if overflow is None else WITH_COLOUR[name](image, level, overflow)


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "Identity": lambda image, level: image,
    "AutoContrast": lambda image, level, overflow: auto_contrast(image, overflow),
    "Equalize": lambda image, level: equalize(image),
    "Brightness": lambda image, level: brightness(image, 1.8 * level + 0.1),
    "Sharpness": lambda image, level, overflow: sharpness(image, 1.8 * level + 0.1, overflow),
    "ShearX": lambda image, level: _warp(image, np.array([[1, 0.3 * level, 0], [0, 1, 0]])),
    "ShearY": lambda image, level: _warp(image, np.array([[1, 0, 0], [0.3 * level, 1, 0]])),
    "TranslateX": lambda image, level: translate_x(image, 10 * level),
    "TranslateY": lambda image, level: translate_y(image, 10 * level),
    "Rotate": lambda image, level: rotate(image, 30 * level),
}
PHOTOMETRIC = tuple(OPERATIONS)[:5]
COLOUR_OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "Solarize": lambda image, level: solarize(image, int(256 * level)),
    "Color": lambda image, level: colour(image, 1.8 * level + 0.1),
    "Contrast": lambda image, level: contrast(image, 1.8 * level + 0.1),
    "Posterize": lambda image, level: posterize(image, int(4 * level)),
}
WITH_COLOUR = OPERATIONS | COLOUR_OPERATIONS
SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class PixelAugment(Protocol):
    """(H, W, 3) uint8 to the same; all chance comes from the generator."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray: ...


class RandomAugment:
    """``count`` operations drawn with replacement, each applied with probability ``probability``.

    Args:
        operations: to draw from; :data:`PHOTOMETRIC` ones move no pixel, as DGM4's boxes ask for.
        count: number of operations; official: 2.
        level: their strength, of 10; official: 7.
        autocontrast_overflow: True reproduces the official AutoContrast, whose unsigned byte overflows and makes every
            channel without a pixel of value 0 wholly white: in 19 % of DGM4's official training images it was drawn.
        sharpness_overflow: True lets sharpened values beyond 0..255 wrap around as officially; False clips them.
    """

    def __init__(
        self,
        operations: Sequence[str] = tuple(OPERATIONS),
        count: int = 2,
        level: int = 7,
        probability: float = 0.5,
        autocontrast_overflow: bool = False,
        sharpness_overflow: bool = False,
    ):
        if unknown := set(operations) - WITH_COLOUR.keys():
            raise UserError(f"unknown augmentations {sorted(unknown)}; there are {', '.join(WITH_COLOUR)}.")
        self.operations, self.count, self.level, self.probability = list(operations), count, level / MAX_LEVEL, probability
        self.overflow = {"autocontrast_overflow": autocontrast_overflow, "sharpness_overflow": sharpness_overflow}

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 to the same; all chance comes from ``rng``."""
        for name in rng.choice(self.operations, size=self.count):
            applied, positive = rng.random(2) < (self.probability, 0.5)
            if applied:
                level = self.level if positive or name not in SIGNED else -self.level
                image = apply_operation(str(name), image, level, **self.overflow)
        return image


def random_box(
    width: int, height: int, scale: tuple[float, ...], ratio: tuple[float, ...], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop of random area (a share of the image's) and shape (width by height), as
    torchvision's RandomResizedCrop draws it: ten tries, then the largest centred box whose shape is allowed."""
    for _ in range(10):
        area = width * height * rng.uniform(scale[0], scale[1])
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * shape)), min(height, round(width / shape))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class AugmentedCrop:
    """A training image of freeze-align (and ALBEF): a random crop, perhaps mirrored, then random operations.

    Args:
        scale: least and greatest share of the image's area that the crop takes.
        ratio: narrowest and widest shape of the crop, width by height.
        flip_probability: of mirroring it.
        operations: on the crop at its final size; None: none.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        operations: PixelAugment | None = None,
    ):
        self.scale, self.ratio = tuple(scale), tuple(ratio)
        self.flip_probability, self.operations = flip_probability, operations

    def __call__(self, image: Image.Image, preprocess: ImagePreprocess, rng: np.random.Generator) -> Tensor:
        """An image to (3, H, W) float32 with the size, interpolation, mean and deviation of ``preprocess``; all chance comes
        from ``rng``."""
        image = image.convert("RGB")
        crop = image.crop(random_box(*image.size, self.scale, self.ratio, rng))
        height, width = preprocess.size
        crop = crop.resize((width, height), Image.Resampling[preprocess.interpolation])
        if rng.random() < self.flip_probability:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.array(crop)
        if self.operations is not None:
            pixels = self.operations(pixels, rng)
        return preprocess.normalised(pixels)
