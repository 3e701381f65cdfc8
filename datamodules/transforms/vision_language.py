"""Transforms of vision-language models: CLIP's crop and ALBEF's squash, with their random augmentations."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image
from torch import Tensor

from datamodules.transforms.augment import AugmentedCrop, PixelAugment
from models.encoders.preprocess import ImagePreprocess

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class SquareImage:
    """An image to a square tensor, normalised as CLIP's.

    Args:
        size: side in pixels.
        fit: ``crop`` resizes the shorter side and crops the centre (``clip``); ``squash`` changes the aspect ratio (``blip``,
            ``albef``).
        operations: random operations on the whole image before it is resized (``clip_randaug``); null: none.
        crop: random part of the image that is taken instead, see :class:`~datamodules.transforms.augment.AugmentedCrop`
            (``blip_randaug``, ``albef_randaug``); null: none.
    """

    def __init__(
        self,
        size: int,
        fit: Literal["crop", "squash"] = "crop",
        operations: PixelAugment | None = None,
        crop: AugmentedCrop | None = None,
    ):
        self.preprocess = ImagePreprocess((size, size), size if fit == "crop" else None, "BICUBIC", CLIP_MEAN, CLIP_STD)
        self.operations, self.crop = operations, crop
        self.normalisation = (CLIP_MEAN, CLIP_STD)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Tensor:
        """(3, size, size) float32; without ``rng`` nothing is random."""
        if rng is None:
            return self.preprocess(image)
        if self.operations is not None:
            image = Image.fromarray(self.operations(np.asarray(image.convert("RGB")), rng))
        return self.preprocess(image) if self.crop is None else self.crop(image, self.preprocess, rng)
