"""An image as a vision encoder of fixed input size sees it: as a whole, and in tiles on a grid that fits its shape."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension

from models.two_tower.tiles import Grids, grid_of, pinpoints, visual_tokens

MEAN = STD = 0.5  # of SigLIP


class Tiles:
    """An RGB image to (1 + tiles, 3, side, side), as LLaVA-OneVision prepares it.

    The first one is the whole image, squeezed to the square. The tiles are those of the image resized with its shape to the
    grid of tiles that holds most of it, on black.

    Args:
        image_size: side of the encoder's input, pixels.
        patch_size: side of a patch, pixels.
        grids: see :data:`~models.two_tower.tiles.Grids`; None: the whole image alone.
    """

    def __init__(self, image_size: int, patch_size: int, grids: Grids | None = None):
        self.side, self.patches = image_size, image_size // patch_size
        self.points = None if grids is None else pinpoints(grids, image_size)

    def __call__(self, image: Image.Image) -> Tensor:
        parts = [image.resize((self.side, self.side), Image.Resampling.BICUBIC)]
        if self.points is not None:
            rows, columns = grid_of((image.height, image.width), self.points, self.side)
            whole = (rows * self.side, columns * self.side)
            height, width = get_patch_output_size(np.empty((image.height, image.width, 3)), whole, ChannelDimension.LAST)
            canvas = Image.new("RGB", whole[::-1])
            resized = image.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(resized, ((whole[1] - width) // 2, (whole[0] - height) // 2))
            corners = [(column * self.side, row * self.side) for row in range(rows) for column in range(columns)]
            parts += [canvas.crop((x, y, x + self.side, y + self.side)) for x, y in corners]
        pixels = torch.from_numpy(np.stack([np.asarray(part) for part in parts]))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD

    def tokens(self, image: Image.Image) -> int:
        """How many visual tokens the image becomes."""
        return visual_tokens((image.height, image.width), self.points, self.side, self.patches)
