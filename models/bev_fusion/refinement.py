"""Convolutions that CaDConv is compared with: they take its place and have its residual form."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d


class PlainDilated(nn.Module):
    """One 3x3 convolution of a fixed dilation; 1 is a plain convolution."""

    def __init__(self, channels: int, dilation: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


class DeformableConv(nn.Module):
    """A modulated deformable 3x3 convolution (DCNv2), started as a plain one."""

    def __init__(self, channels: int):
        super().__init__()
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_normal_(self.weight)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        moves, mask = self.offset(x).split([18, 9], dim=1)
        y = deform_conv2d(x.float(), moves.float(), self.weight.float(), padding=1, mask=2 * mask.float().sigmoid())
        return F.relu(x + self.bn(y.to(x)))
