"""What happens to the pixels of a clip (All-in-One: official rules and corrected ones)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datamodules.readers.base import BadSample
from datamodules.readers.images import MAX_PIXELS

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PYTORCHVIDEO = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))  # the authors' `v100` backend, and K400
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # images in the style of ViLT
NORMALISATIONS = {"imagenet": IMAGENET, "pytorchvideo": PYTORCHVIDEO, "half": HALF}


def resize_clip(clip: NDArray[np.uint8], short: int) -> NDArray[np.uint8]:
    """(T, H, W, 3) with its shorter side made ``short``, through 8-bit Pillow images.

    Bilinear: the official code asks for bicubic by a flag and gets the other one.
    """
    height, width = clip.shape[1:3]
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if size == (width, height):
        return clip
    if size[0] * size[1] > MAX_PIXELS:
        raise BadSample(f"bad shape: frames of {width} x {height} pixels cannot be resized to a shorter side of {short}")
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in clip])


def crop_clip(clip: NDArray[np.uint8], size: int, place: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """A square of ``size`` from (T, H, W, 3), the same in every frame: at ``place`` (down, right, in [0, 1)), or centred."""
    height, width = clip.shape[1:3]
    if place is None:
        top, left = round((height - size) / 2), round((width - size) / 2)
    else:
        top, left = int(place[0] * (height - size + 1)), int(place[1] * (width - size + 1))
    return clip[:, top : top + size, left : left + size]


def to_tensor(clip: NDArray[np.uint8], normalisation: tuple[Sequence[float], Sequence[float]] = IMAGENET) -> Tensor:
    """(T, H, W, 3) uint8 to normalised (T, 3, H, W) float32."""
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in normalisation)
    return (torch.from_numpy(np.array(clip)).permute(0, 3, 1, 2).float() / 255 - mean) / std


class ClipTransform:
    """Resize the shorter side, crop, normalise; in training the crop is random and shared by all frames.

    Args:
        size: side of the crop in pixels.
        resize_ratio: the shorter side becomes int(ratio * size), 268 for 224 (official).
        normalisation: tie it to the checkpoint: ``imagenet`` for All-in-One's default backend, ``pytorchvideo`` for
            co-trained models and K400, ``half`` for images.
        flip: mirror half of the training clips (off in the default backend: left and right have names).
        largest_ratio: in training the shorter side is drawn between ``resize_ratio`` and this (the ``v100`` backend: 1.5).
        rand_augment: magnitude, of 30, of two random operations in training, the same on all frames; 0: none. They are
            torchvision's, where the official backend has pytorchvideo's.
    """

    def __init__(
        self,
        size: int = 224,
        resize_ratio: float = 1.2,
        normalisation: Literal["imagenet", "pytorchvideo", "half"] = "imagenet",
        flip: bool = False,
        largest_ratio: float | None = None,
        rand_augment: int = 0,
    ):
        self.size, self.short = size, int(resize_ratio * size)
        self.longest_short = None if largest_ratio is None else int(largest_ratio * size)
        self.normalisation = NORMALISATIONS[normalisation]
        self.flip, self.rand_augment = flip, rand_augment

    def __call__(self, clip: NDArray[np.uint8], rng: np.random.Generator | None = None) -> Tensor:
        """(T, H, W, 3) uint8 to (T, 3, size, size); ``rng`` decides on the augmentation, None: no augmentation."""
        if rng is None:
            return to_tensor(crop_clip(resize_clip(clip, self.short), self.size), self.normalisation)
        down, right, mirrored, scale = rng.random(4)
        if self.rand_augment:
            clip = _rand_augment(clip, self.rand_augment, int(rng.integers(2**31)))
        short = self.short if self.longest_short is None else int(self.short + scale * (self.longest_short - self.short + 1))
        clip = resize_clip(clip, short)
        clip = crop_clip(clip, self.size, (down, right))
        return to_tensor(clip[:, :, ::-1] if self.flip and mirrored < 0.5 else clip, self.normalisation)


def resize_image(image: Image.Image, short: int = 224, longest: int = 373) -> Image.Image:
    """ViLT's ("pixelbert") resize: shorter side ``short``, longer at most ``longest``, both cut to multiples of 32."""
    width, height = image.size
    scale = short / min(width, height)
    wide, high = (short, scale * height) if width <= height else (scale * width, short)
    if max(wide, high) > longest:
        scale = longest / max(wide, high)
        wide, high = wide * scale, high * scale
    size = (max(int(wide + 0.5) // 32 * 32, 32), max(int(high + 0.5) // 32 * 32, 32))
    return image.resize(size, Image.Resampling.BICUBIC)


class ImageTransform:
    """Still images of co-training: ViLT's resize, which keeps the aspect ratio; batches of them are padded with zeros.

    Args:
        short: shorter side in pixels.
        longest: largest longer side in pixels.
        rand_augment: see :class:`ClipTransform`.
    """

    def __init__(self, short: int = 224, longest: int = 373, rand_augment: int = 0):
        self.short_side, self.longest, self.rand_augment = short, longest, rand_augment
        self.normalisation = HALF

    def __call__(self, clip: NDArray[np.uint8], rng: np.random.Generator | None = None) -> Tensor:
        """(1, H, W, 3) uint8 to (1, 3, h, w), h and w multiples of 32."""
        if rng is not None and self.rand_augment:
            clip = _rand_augment(clip, self.rand_augment, int(rng.integers(2**31)))
        resized = [np.asarray(resize_image(Image.fromarray(frame), self.short_side, self.longest)) for frame in clip]
        return to_tensor(np.stack(resized), self.normalisation)


def _rand_augment(clip: NDArray[np.uint8], magnitude: int, seed: int) -> NDArray[np.uint8]:
    """Two random operations, the same on every frame; a pure function of its arguments."""
    from torchvision.transforms.v2 import RandAugment

    frames = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RandAugment(num_ops=2, magnitude=magnitude)(frames).permute(0, 2, 3, 1).numpy()
