"""Multi-crop augmentation of DINOv2 (``data/augmentations.py``), with every probability and strength a setting.

Grey images stay one channel until the end, where colour operations change nothing; all chance comes from a numpy generator.
Values are float32 between the operations, which torchvision rounds to whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from datamodules.transforms.augment import random_box

RATIO = (3 / 4, 4 / 3)  # narrowest and widest shape of a crop
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
KERNEL = 9  # taps of the blur
SOLARIZE_FROM = 128


class Crops(NamedTuple):
    """``global_``: two (3, H, W) float32. ``local``: (L, 3, h, w) float32."""

    global_: tuple[Tensor, Tensor]
    local: Tensor


class MultiCrop:
    """Two global and several local crops of an image. The defaults are DINOv2's at patch size 14.

    Args:
        global_size, local_size: sides of the square crops in pixels.
        local_count: L.
        global_scale, local_scale: least and greatest share of the image's area that a crop takes.
        flip: probability of mirroring.
        jitter: strengths of brightness, contrast, saturation and hue.
        jitter_probability: of all four together, in random order.
        grey: probability of removing the colours.
        blur: probabilities of blurring the first global, the second global and the local crops.
        official_blur: True blurs with one minus these probabilities, as the official code does: its class hands ``1 - p`` to a
            function that applies with the probability given. The released models saw 0, 0.9 and 0.5.
        sigma: least and greatest width of the blur in pixels.
        solarize: probability of inverting the bright half of the second global crop.
        mean, std: of the normalisation, for values between 0 and 1.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 98,
        local_count: int = 8,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        flip: float = 0.5,
        jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
        jitter_probability: float = 0.8,
        grey: float = 0.2,
        blur: Sequence[float] = (1.0, 0.1, 0.5),
        official_blur: bool = False,
        sigma: tuple[float, float] = (0.1, 2.0),
        solarize: float = 0.2,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        self.global_size, self.local_size, self.local_count = global_size, local_size, local_count
        self.global_scale, self.local_scale, self.flip = tuple(global_scale), tuple(local_scale), flip
        self.jitter, self.jitter_probability, self.grey = tuple(jitter), jitter_probability, grey
        self.blur = tuple(1 - p if official_blur else p for p in blur)
        self.sigma, self.solarize = tuple(sigma), solarize
        self.mean, self.std = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Crops:
        """The crops of an image in mode L or RGB."""
        first = self._crop(image, self.global_size, self.global_scale, self.blur[0], 0.0, rng)
        second = self._crop(image, self.global_size, self.global_scale, self.blur[1], self.solarize, rng)
        local = [self._crop(image, self.local_size, self.local_scale, self.blur[2], 0.0, rng) for _ in range(self.local_count)]
        empty = torch.zeros(0, 3, self.local_size, self.local_size)
        return Crops((first, second), torch.stack(local) if local else empty)

    def _crop(
        self, image: Image.Image, size: int, scale: tuple[float, ...], blur: float, solarize: float, rng: np.random.Generator
    ) -> Tensor:
        box = random_box(*image.size, scale, RATIO, rng)
        crop = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(crop, dtype=np.float32)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if rng.random() < self.flip:
            pixels = pixels[:, ::-1]
        if rng.random() < self.jitter_probability:
            pixels = self._jittered(pixels, rng)
        if rng.random() < self.grey and pixels.shape[2] == 3:
            pixels = np.repeat((pixels @ LUMA)[..., None], 3, axis=2)
        if rng.random() < blur:
            pixels = gaussian_blur(pixels, float(rng.uniform(self.sigma[0], self.sigma[1])))
        if rng.random() < solarize:
            pixels = np.where(pixels >= SOLARIZE_FROM, 255 - pixels, pixels)
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)) / 255  # one plane of a grey image meets the three statistics
        return torch.from_numpy((planes - self.mean[:, None, None]) / self.std[:, None, None])

    def _jittered(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        brightness, contrast, saturation, hue = self.jitter
        for operation in rng.permutation(4):
            if operation == 0 and brightness:
                pixels = (pixels * rng.uniform(max(1 - brightness, 0), 1 + brightness)).clip(0, 255)
            elif operation == 1 and contrast:
                mean = _grey(pixels).mean()
                pixels = (mean + (pixels - mean) * rng.uniform(max(1 - contrast, 0), 1 + contrast)).clip(0, 255)
            elif operation == 2 and saturation:
                factor = rng.uniform(max(1 - saturation, 0), 1 + saturation)
                grey = _grey(pixels)
                pixels = (grey + (pixels - grey) * factor).clip(0, 255)
            elif operation == 3 and hue:
                pixels = shift_hue(pixels, rng.uniform(-hue, hue))
        return pixels.astype(np.float32)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1) luma."""
    return pixels if pixels.shape[2] == 1 else (pixels @ LUMA)[..., None]


def shift_hue(pixels: np.ndarray, share: float) -> np.ndarray:
    """(H, W, 3) in 0..255 with hues turned by a share of the circle; grey images (H, W, 1) as they are."""
    if pixels.shape[2] == 1:
        return pixels
    hsv = np.array(Image.fromarray(pixels.astype(np.uint8)).convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + int(share * 255)) % 256
    return np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"), dtype=np.float32)


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W, C) convolved with a normalised Gaussian of nine taps, mirrored at the edges, as torchvision's."""
    half = KERNEL // 2
    taps = np.array([math.exp(-0.5 * (x / sigma) ** 2) for x in range(-half, half + 1)], dtype=np.float32)
    taps /= taps.sum()
    for axis in (0, 1):
        length = pixels.shape[axis]
        period = max(2 * (length - 1), 1)
        mirrored = np.arange(-half, length + half) % period
        padded = pixels.take(np.minimum(mirrored, period - mirrored), axis=axis)
        parts = [padded[:, i : i + length] if axis else padded[i : i + length] for i in range(KERNEL)]
        pixels = taps[0] * parts[0]
        for tap, part in zip(taps[1:], parts[1:], strict=True):
            pixels += tap * part
    return pixels
