"""Plain forms of the fisheye + ultrasonic fusion: what its equations say, step by step."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.bev_fusion.cadconv import CaDConv, stacked_taps


def cadconv(layer: CaDConv, x: Tensor) -> Tensor:
    """The layer's dynamic mode with :func:`stacked_taps`."""
    alpha, taps = layer.choices(x)
    y = layer.out(stacked_taps(layer.value(x), alpha, taps, layer.dilations))
    return F.relu(x + layer.bn(y))
