"""RandAugment of photometric operations, none of which moves a pixel (DGM4's official ``dataset/randaugment.py``).

Operations take and give an image (H, W, 3) uint8.
"""

from __future__ import annotations

from functools import partial

import numpy as np

OPERATIONS = ("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness")


class PhotometricAugment:
    """``count`` operations drawn with replacement, each applied with probability one half.

    Args:
        count: operations drawn for an image.
        level: 0 to 10; Brightness and Sharpness use the factor ``0.18 level + 0.1``.
        autocontrast_overflow: True reproduces the official AutoContrast, whose unsigned byte overflows and makes every
            channel without a pixel of value 0 wholly white: in 19 % of the official training images it was drawn.
        sharpness_overflow: True lets sharpened values beyond 0..255 wrap around as officially; False clips them.
    """

    def __init__(self, count: int = 2, level: int = 7, autocontrast_overflow: bool = False, sharpness_overflow: bool = False):
        self.count = count
        factor = level / 10 * 1.8 + 0.1
        self.operations = {
            "Identity": lambda image: image,
            "AutoContrast": partial(auto_contrast, overflow=autocontrast_overflow),
            "Equalize": equalize,
            "Brightness": partial(brightness, factor=factor),
            "Sharpness": partial(sharpness, factor=factor, overflow=sharpness_overflow),
        }

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for name in rng.choice(OPERATIONS, self.count):
            if rng.random() <= 0.5:
                image = self.operations[name](image)
        return image


def auto_contrast(image: np.ndarray, overflow: bool = False) -> np.ndarray:
    """Stretches each channel to 0..255. See :class:`PhotometricAugment` for ``overflow``."""
    return _by_channel(image, partial(_contrast_table, overflow=overflow))


def _contrast_table(channel: np.ndarray, overflow: bool) -> np.ndarray | None:
    low, high = int(channel.min()), int(channel.max())
    if high <= low:
        return None
    scale = 255 / (high - low)
    negated = (256 - low) % 256 if overflow else -low  # an unsigned byte has no negative
    return np.clip(np.arange(256) * scale + negated * scale, 0, 255)


def equalize(image: np.ndarray) -> np.ndarray:
    """Evens out the histogram of each channel."""
    return _by_channel(image, _equal_table)


def _equal_table(channel: np.ndarray) -> np.ndarray | None:
    counts = np.bincount(channel.ravel(), minlength=256)
    step = counts[counts != 0][:-1].sum() // 255
    if step == 0:
        return None
    return np.clip(np.cumsum(np.concatenate([[step // 2], counts[:-1]])) // step, 0, 255)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies by ``factor``, clipped."""
    return np.clip(np.arange(256, dtype=np.float32) * factor, 0, 255).astype(np.uint8)[image]


def sharpness(image: np.ndarray, factor: float, overflow: bool = False) -> np.ndarray:
    """Away from a 3x3 blur by ``factor``; the outermost pixels stay. See :class:`PhotometricAugment` for ``overflow``."""
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


def _by_channel(image: np.ndarray, table_of) -> np.ndarray:
    channels = []
    for channel in np.moveaxis(image, -1, 0):
        table = table_of(channel)
        channels.append(channel if table is None else table.astype(np.uint8)[channel])
    return np.stack(channels, axis=-1)
