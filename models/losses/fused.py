"""Where the fused kernels of :mod:`models.losses.kernels` take the place of plain torch."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels for logits computed from ``x``: on a GPU with Triton, or in Triton's interpreter, for all types but float64.
    None: plain torch."""
    runs = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if runs and x.dtype != torch.float64 and importlib.util.find_spec("triton"):
        return importlib.import_module("models.losses.kernels")
    return None
