"""What augmenting a training image costs the workers that read (freeze-align's recipe)."""

from __future__ import annotations

import time

import numpy as np
from PIL import Image

from datamodules.transforms.augment import AugmentedCrop, RandomAugment
from models.encoders.preprocess import ImagePreprocess

PICTURES = 200


def augmentation() -> dict[str, float]:
    """Processor milliseconds for a image of 500 x 400 pixels, not decoded: the crop to 256 x 256, and with operations."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    image, preprocess = Image.fromarray(pixels), ImagePreprocess((256, 256), None)
    found = {}
    for name, operations in (("crop_ms", None), ("crop_and_operations_ms", RandomAugment())):
        augment = AugmentedCrop(operations=operations)
        began = time.thread_time()
        for row in range(PICTURES):
            augment(image, preprocess, np.random.default_rng(row))
        found[name] = 1000 * (time.thread_time() - began) / PICTURES
    return found


MEASURES = {"augmentation": augmentation}
