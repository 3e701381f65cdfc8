"""Position tables of vision transformers at other image sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(table: Tensor, height: int, width: int, offset: float = 0.1, antialias: bool = False) -> Tensor:
    """Table (1, 1 + n², D), CLS first, for a grid of ``height`` x ``width`` patches: (1, 1 + height * width, D).

    Bicubic by the scale factors ``(height + offset) / n`` and ``(width + offset) / n``, as the DINOv2 of its day did, and
    not to an explicit size, as transformers does now: the sampling points differ. At the table's own size it is returned
    as it is. ``offset=0`` resizes to the exact grid, which DINOv2 with registers does, with ``antialias``.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if height == width == side:
        return table
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((height + offset) / side, (width + offset) / side)
    target: dict[str, Any] = {"scale_factor": factors} if offset else {"size": (height, width)}
    grid = F.interpolate(grid.float(), **target, mode="bicubic", align_corners=False, antialias=antialias)
    if grid.shape[-2:] != (height, width):
        raise ValueError(f"offset={offset} gives a grid of {tuple(grid.shape[-2:])} instead of ({height}, {width})")
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def use_scaled_positions(embeddings: Any, offset: float = 0.1) -> None:
    """Make transformers' Dinov2Embeddings resize its table by :func:`resize_positions`."""
    patch = embeddings.patch_size

    def interpolate(_: Tensor, height: int, width: int) -> Tensor:
        return resize_positions(embeddings.position_embeddings, height // patch, width // patch, offset)

    embeddings.interpolate_pos_encoding = interpolate
