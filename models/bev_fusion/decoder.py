"""Fusing the two branches and reading occupancy from them in two stages.

Concatenation and a two-stage semantic occupancy decoder are the paper's; their form, and the other fusions, are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UserError

FUSIONS = ("concat", "add", "max", "mean", "gated", "attention")


class Fusion(nn.Module):
    """Camera and ultrasonic features (B, C, H, W) to one map of ``out_channels``.

    Args:
        kind: 'concat' (camera first), 'add', 'max', 'mean', 'gated' (a learnt share per cell) or 'attention' (a softmax
            of two learnt scores per cell).
    """

    def __init__(self, kind: str, channels: int):
        super().__init__()
        if kind not in FUSIONS:
            raise UserError(f"unknown fusion '{kind}'; there are {', '.join(FUSIONS)}.")
        self.kind = kind
        self.out_channels = 2 * channels if kind == "concat" else channels
        if kind in ("gated", "attention"):
            self.score = nn.Conv2d(2 * channels, 1 if kind == "gated" else 2, 1)

    def forward(self, camera: Tensor, ultrasonic: Tensor) -> Tensor:
        if self.kind == "add":
            return camera + ultrasonic
        if self.kind == "max":
            return torch.maximum(camera, ultrasonic)
        if self.kind == "mean":
            return (camera + ultrasonic) / 2
        both = torch.cat([camera, ultrasonic], dim=1)
        if self.kind == "concat":
            return both
        score = self.score(both)
        share = score.sigmoid() if self.kind == "gated" else score.softmax(1)[:, :1]
        return share * camera + (1 - share) * ultrasonic


class Occupancy(NamedTuple):
    """``coarse`` (B, 1, H, W) occupancy logits, ``classes`` (B, K, 2H, 2W) class logits."""

    coarse: Tensor
    classes: Tensor


class Decoder(nn.Module):
    """Stage 1 finds what is occupied on the coarse grid; stage 2 looks twice at those cells and names classes on the fine one.

    Args:
        in_channels: of the fused map.
        channels: C inside stage 1, half of it in stage 2.
        num_classes: K, free space included.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        self.stage1 = nn.Sequential(_block(in_channels, channels), _block(channels, channels))
        self.occ = nn.Conv2d(channels, 1, 1)
        self.stage2 = nn.Sequential(_block(channels, channels // 2), _block(channels // 2, channels // 2))
        self.cls = nn.Conv2d(channels // 2, num_classes, 1)

    def forward(self, fused: Tensor) -> Occupancy:
        x = self.stage1(fused)
        coarse = self.occ(x)
        x = x * (1 + coarse.sigmoid())
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return Occupancy(coarse, self.cls(self.stage2(x)))


def _block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())
