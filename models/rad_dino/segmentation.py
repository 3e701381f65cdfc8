"""Segmentation on frozen patch features: DINOv2's linear head, and a pyramid with UPerNet behind it.

Structures of a radiograph overlap (ribs lie over lungs), so that the probes give one logit per structure and not one class per
pixel. Shapes: B images, D width of the features, C structures or classes, h x w patches, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import VOID_LABEL
from models.rad_dino.backbone import DinoViT

POOLED = (1, 2, 3, 6)  # sides of UPerNet's pooled maps


class LinearSegmentation(nn.Module):
    """Class logits of every pixel: batch normalisation and a 1x1 convolution (DINOv2's ``BNHead``, whose names these are).

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
        return _upsampled(self.conv_seg(self.bn(patch_map)), size)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of (B, D, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PyramidSegmentation(nn.Module):
    """ViTDet's simple feature pyramid (arXiv 2203.16527) and UPerNet (arXiv 1807.10221) on the last map of patches.

    The pyramid has a quarter, a half, one and two patches as its strides.

    Args:
        dim: D.
        num_classes: C.
        channels: of the pyramid and behind it.
    """

    def __init__(self, dim: int, num_classes: int, channels: int = 256):
        super().__init__()

        def doubled(width: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)

        scales: list[tuple[nn.Module, int]] = [
            (nn.Sequential(doubled(dim), LayerNorm2d(dim // 2), nn.GELU(), doubled(dim // 2)), dim // 4),
            (doubled(dim), dim // 2),
            (nn.Identity(), dim),
            (nn.MaxPool2d(2, ceil_mode=True), dim),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale, _conv(width, channels, 1), LayerNorm2d(channels), _conv(channels, channels, 3), LayerNorm2d(channels)
            )
            for scale, width in scales
        )
        self.pooled = nn.ModuleList(_conv_norm(channels, channels, 1) for _ in POOLED)
        self.bottleneck = _conv_norm(channels * (1 + len(POOLED)), channels, 3)
        self.smooth = nn.ModuleList(_conv_norm(channels, channels, 3) for _ in scales[1:])
        self.fuse = _conv_norm(channels * len(scales), channels, 3)
        self.classify = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, patch_map: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, D, h, w) to logits (B, C, H, W), bilinearly upsampled to ``size`` (H, W)."""
        levels = [level(patch_map) for level in self.levels]
        top = levels[-1]
        pooled = [conv(F.adaptive_avg_pool2d(top, side)) for side, conv in zip(POOLED, self.pooled, strict=True)]
        levels[-1] = self.bottleneck(torch.cat([top, *(_upsampled(x, top.shape[2:]) for x in pooled)], dim=1))
        for finer in range(len(levels) - 2, -1, -1):
            levels[finer] = levels[finer] + _upsampled(levels[finer + 1], levels[finer].shape[2:])
        smoothed = [conv(level) for conv, level in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        joined = torch.cat([_upsampled(level, levels[0].shape[2:]) for level in smoothed], dim=1)
        return _upsampled(self.classify(self.fuse(joined)), size)


def patch_maps(encoder: DinoViT, images: Tensor) -> Tensor:
    """(B, D, h, w) patch features of images (B, 3, H, W)."""
    grid = [side // encoder.patch_size for side in images.shape[2:]]
    return encoder(images).patches.transpose(1, 2).unflatten(2, grid)


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus one minus soft Dice, a mean over the structures that the batch has masks of.

    The Dice of a structure is that of the whole batch: in a mean over images, those without the structure would outweigh the
    others, and a rare structure would never be predicted.

    Args:
        logits: (B, C, H, W).
        masks: (B, C, H, W) uint8: 1 inside, 0 outside, VOID_LABEL unknown.
    """
    known = (masks != VOID_LABEL).float()
    target, chance = (masks == 1).float(), logits.sigmoid() * known
    entropy = F.binary_cross_entropy_with_logits(logits, target, known, reduction="sum") / known.sum().clamp_min(1)
    present = known.amax(dim=(0, 2, 3))
    overlap, areas = (chance * target).sum(dim=(0, 2, 3)), (chance + target).sum(dim=(0, 2, 3))
    dice = (2 * overlap + 1) / (areas + 1)
    return entropy + ((1 - dice) * present).sum() / present.sum().clamp_min(1)


def train_segmentation(
    head: nn.Module,
    maps: Tensor,
    masks: Tensor,
    steps: int = 2000,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """Train a head on frozen features: AdamW, weight decay 0.01, a rate that falls by a cosine to 0. Returns it in eval mode.

    Args:
        head: ``(maps, size) -> logits``.
        maps: (N, D, h, w), also in half precision.
        masks: (N, C, H, W) uint8.
        steps: of the optimiser.
        batch_size: images per step, drawn with replacement.
        lr: first rate.
        seed: of the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    device = next(head.parameters()).device
    size = (masks.shape[2], masks.shape[3])
    head.train()
    for _ in range(steps):
        rows = torch.randint(len(maps), (batch_size,), generator=generator)
        loss = segmentation_loss(head(maps[rows].to(device).float(), size), masks[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def _upsampled(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=(size[0], size[1]), mode="bilinear", align_corners=False)


def _conv(width: int, channels: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=False)


def _conv_norm(width: int, channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_conv(width, channels, kernel), LayerNorm2d(channels), nn.ReLU())
