"""Camera features from the image plane into bird's-eye view (how the paper does it is not
established)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UserError

POOLINGS = ("concat", "mean", "softmax")


def sample_views(features: Tensor, grid: Tensor, valid: Tensor) -> Tensor:
    """Bilinear samples of (B, C, h, w) at (B, Z, rows, cols, 2), zero where ``valid`` (B, Z, rows, cols) is false:
    (B, Z, C, rows, cols)."""
    batch, heights, rows, cols, _ = grid.shape
    flat = grid.reshape(batch, heights * rows, cols, 2).to(features)
    sampled = F.grid_sample(features, flat, mode="bilinear", padding_mode="zeros", align_corners=False)
    sampled = sampled.view(batch, -1, heights, rows, cols).transpose(1, 2)
    return sampled * valid[:, :, None].to(features)


class ViewTransform(nn.Module):
    """Every cell looks at its place in the image at several heights above the ground.

    Args:
        channels: C.
        heights: Z, how many heights the sampling grid has.
        pooling: 'concat' of the heights before the 1x1 convolution; 'mean' over those the image shows; 'softmax', one learnt
            score a height and cell.
    """

    def __init__(self, channels: int, heights: int, pooling: str = "concat"):
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"unknown pooling of heights '{pooling}'; there are {', '.join(POOLINGS)}.")
        self.pooling = pooling
        inside = heights * channels if pooling == "concat" else channels
        self.mix = nn.Sequential(nn.Conv2d(inside, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        if pooling == "softmax":
            self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor, grid: Tensor, valid: Tensor) -> Tensor:
        """(B, C, h, w) with the grid and mask of :func:`~models.bev_fusion.geometry.sampling_grid` to (B, C, rows, cols)."""
        views = sample_views(features, grid, valid)
        seen = valid[:, :, None].to(views)
        if self.pooling == "concat":
            pooled = views.flatten(1, 2)
        elif self.pooling == "mean":
            pooled = views.sum(1) / seen.sum(1).clamp(min=1)
        else:
            scores = self.score(views.flatten(0, 1)).unflatten(0, views.shape[:2]).float()
            share = scores.masked_fill(seen == 0, -torch.inf).softmax(1).nan_to_num(0.0)
            pooled = (share.to(views) * views).sum(1)
        return self.mix(pooled)
