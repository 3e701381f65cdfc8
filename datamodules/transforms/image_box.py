"""Images with a box: flipped, resized, augmented and normalised together (DGM4's official ``dataset/dataset.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def box_target(box: Sequence[float], size: tuple[int, int], flip: bool = False) -> Tensor:
    """Corner box in pixels of the stored image to (4,) centre x, centre y, width, height as shares of it.

    Corner and sides are cut to whole pixels as officially. ``[]`` gives zeros.

    Args:
        size: (width, height) of the stored image.
        flip: the image is mirrored left to right.
    """
    if len(box) != 4:
        return torch.zeros(4)
    x, y, width, height = int(box[0]), int(box[1]), int(box[2] - box[0]), int(box[3] - box[1])
    if flip:
        x = size[0] - x - width
    scale = (size[0], size[1], size[0], size[1])
    values = (x + width / 2, y + height / 2, width, height)
    return torch.tensor([value / side for value, side in zip(values, scale, strict=True)])


def image_tensor(
    image: Image.Image, size: int, flip: bool = False, augment: Callable[[np.ndarray], np.ndarray] | None = None
) -> Tensor:
    """RGB image to (3, ``size``, ``size``) float32 with CLIP's statistics; resized bicubically without keeping its shape.

    Args:
        flip: mirror it left to right, before the resize.
        augment: changes the resized pixels (size, size, 3) uint8.
    """
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(_resize(image, size))
    if augment is not None:
        pixels = augment(pixels)
    scaled = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255
    return (scaled - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def _resize(image: Image.Image, size: int) -> Image.Image:
    """Bicubic with antialiasing, the longer side first.

    Pillow versions differ in the order of the two passes, and with it in the last bit of a third of the pixels; the
    reference vectors were made in this order.
    """
    width, height = image.size
    first = (width, size) if height > width else (size, height)
    return image.resize(first, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
