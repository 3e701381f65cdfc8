"""Masked image modelling: which patches are removed, the decoder that restores them, and what it should give.

Parameter names are those of the official checkpoints. Shapes: B batch, P patches, n patches that are left, W decoder width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.two_tower.towers import ClipBlock

_EPS = 1e-6  # added to the variance of a patch


class Patches(NamedTuple):
    """``left`` (B, n): the patches that the encoder sees; ``removed`` (B, P) float32: 1 at the others; ``restore`` (B, P):
    place of each patch in the shuffled order."""

    left: Tensor
    removed: Tensor
    restore: Tensor


def remove_patches(noise: Tensor, share: float = 0.75) -> Patches:
    """Remove the ``share`` of the patches with the largest ``noise`` (B, P)."""
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)
    left = int(noise.shape[1] * (1 - share))
    return Patches(order[:, :left], (restore >= left).float(), restore)


def patch_pixels(image: Tensor, size: int, normalise: bool = True) -> Tensor:
    """(B, P, size * size * 3) pixels of images (B, 3, H, W), channel last.

    Args:
        image: as the encoder takes it.
        size: side of a patch, pixels.
        normalise: each patch to mean 0 and unbiased variance 1.
    """
    grid = image.shape[-1] // size
    pixels = (
        image.float().unflatten(3, (grid, size)).unflatten(2, (grid, size)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    )
    if not normalise:
        return pixels
    return (pixels - pixels.mean(dim=-1, keepdim=True)) / (pixels.var(dim=-1, keepdim=True) + _EPS).sqrt()


def sincos_positions(grid: int, width: int) -> Tensor:
    """(1 + grid², width) fixed positions, zeros for the class token: the first half of the channels tells the column,
    the second the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    of_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = of_axis.repeat(grid, 1), of_axis.repeat_interleave(grid, dim=0)
    positions = torch.cat([columns, rows], dim=1).float()
    return torch.cat([torch.zeros(1, width), positions])


class MaskedImageHead(nn.Module):
    """The decoder: blocks of CLIP's kind over the patches that are left and a mask token in the place of the others.

    Args:
        width: of the features.
        decoder_width: W.
        layers: number of blocks.
        heads: number of heads.
        grid: patches along a side.
        patch_size: side of a patch, pixels.
    """

    def __init__(
        self, width: int, decoder_width: int = 384, layers: int = 4, heads: int = 6, grid: int = 18, patch_size: int = 16
    ):
        super().__init__()
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.register_buffer("decoder_pos_embed", sincos_positions(grid, decoder_width), persistent=False)
        self.decoder = nn.Module()
        self.decoder.resblocks = nn.ModuleList(ClipBlock(decoder_width, heads, eps=1e-5) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, 3 * patch_size**2)
        nn.init.normal_(self.mask_token, std=0.02)
        for block in self.decoder.resblocks:
            nn.init.xavier_uniform_(block.attn.in_proj_weight)

    def forward(self, x: Tensor, restore: Tensor) -> Tensor:
        """(B, P, pixels of a patch).

        Args:
            x: (B, 1 + n, width) class token and patches that are left.
            restore: (B, P) see :class:`Patches`.
        """
        x = self.decoder_embed(x)
        removed = self.mask_token.to(x.dtype).expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], removed], dim=1).take_along_dim(restore[..., None], dim=1)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder.resblocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]
