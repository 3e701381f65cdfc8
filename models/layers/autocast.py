"""Autocast for functions with gradients of their own, which torch's autocast does not reach into."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The type matrix products have under the autocast of this moment; ``otherwise`` outside it."""
    active = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if active else otherwise


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """``out += a @ b``, where ``out`` may be more precise than the product; the ``first`` one replaces what ``out`` holds."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=0 if first else 1)
    elif first:
        out.copy_(torch.mm(a, b))
    else:
        out.add_(torch.mm(a, b))
