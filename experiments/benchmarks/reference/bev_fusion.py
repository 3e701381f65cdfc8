"""Plain forms of the fisheye + ultrasonic fusion: what its equations say, step by step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.bev_fusion.cadconv import CaDConv


def stacked_taps(value: Tensor, alpha: Tensor, taps: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """``y_c(p) = sum_r alpha_r(p) sum_q kappa_{r, g(c), q}(p) V_c(p + d_r o_q)`` by unfolding V once for each dilation.

    value (B, C, H, W), alpha (B, R, H, W), taps (B, R, G, 9, H, W) to (B, C, H, W).
    """
    batch, channels, height, width = value.shape
    groups = taps.shape[2]
    copies = torch.stack([F.unfold(value, 3, dilation=d, padding=d) for d in dilations], dim=1)
    copies = copies.view(batch, len(dilations), groups, channels // groups, 9, height, width)
    fields = (taps[:, :, :, None] * copies).sum(4)
    return (alpha[:, :, None, None] * fields).sum(1).reshape(value.shape)


def cadconv(layer: CaDConv, x: Tensor) -> Tensor:
    """The layer's dynamic mode with :func:`stacked_taps`."""
    alpha, taps = layer.choices(x)
    y = layer.out(stacked_taps(layer.value(x), alpha, taps, layer.dilations))
    return F.relu(x + layer.bn(y))
