"""Linear segmentation on frozen patch features: batch normalisation and a 1x1 convolution (DINOv2's ``BNHead``)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LinearSegmentation(nn.Module):
    """Class logits of every pixel from a map of patch features. Parameter names are the official ones.

    Args:
        dim: D.
        num_classes: C.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(dim)
        self.conv_seg = nn.Conv2d(dim, num_classes, kernel_size=1)

    def forward(self, patch_map: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, D, h, w) to logits (B, C, H, W), bilinearly upsampled to ``size`` (H, W)."""
        return F.interpolate(self.conv_seg(self.bn(patch_map)), size=size, mode="bilinear", align_corners=False)
