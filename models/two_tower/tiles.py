"""How LLaVA-OneVision shows an image of any size: as a whole and, on a grid of tiles that fits its shape, in parts.

Both the data, which counts visual tokens, and the model, which arranges them, ask here. Tiles have the side of the vision
encoder's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

Grids = Sequence[Sequence[int]] | int  # [columns, rows] of the grids to choose from; an int n: all from 1 x 1 to n x n
MAX_TILES = 9  # the patches of more tiles than these are shrunk to about as many (anyres_max_9)


def pinpoints(grids: Grids, side: int) -> list[list[int]]:
    """[height, width] in pixels of every grid, as transformers names them.

    They stand in the order of LLaVA's scripts, columns before rows, since the first of two equally good ones is taken.

    Args:
        grids: see above.
        side: of a tile, pixels.
    """
    if isinstance(grids, int):
        grids = [[columns, rows] for columns in range(1, grids + 1) for rows in range(1, grids + 1)]
    return [[rows * side, columns * side] for columns, rows in grids]


def grid_of(size: Sequence[int], points: list[list[int]], side: int) -> tuple[int, int]:
    """(rows, columns) of tiles for an image of ``size`` (height, width)."""
    height, width = select_best_resolution(tuple(size), points)
    return height // side, width // side


def visual_tokens(size: Sequence[int], points: list[list[int]] | None, side: int, patches: int) -> int:
    """How many visual tokens an image becomes.

    Args:
        size: height and width of the image, pixels.
        points: see :func:`pinpoints`; None: the image is shown as a whole alone, without ends of lines.
        side: of a tile, pixels.
        patches: along a side of a tile.
    """
    if points is None:
        return patches**2
    rows, columns = grid_of(size, points, side)
    empty = torch.empty(1, 1, 1).expand(1, rows * patches, columns * patches)
    height, width = unpad_image(empty, tuple(size)).shape[1:]
    ratio = math.sqrt(height * width / (MAX_TILES * patches**2))
    if ratio > 1.1:
        height, width = int(height // ratio), int(width // ratio)
    return patches**2 + height * (width + 1)
