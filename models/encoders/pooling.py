"""How the tokens of a vision transformer become one vector."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["concat", "cls", "patch", "patch_mode"]


def pool_tokens(tokens: Tensor, mode: Pooling) -> Tensor:
    """Tokens (B, 1 + P, D), CLS first, to image vectors (SAIL, arXiv 2412.04616, section 3.1). Not normalised.

    ``concat``: [CLS; mean of patches] (B, 2D). ``cls``: (B, D). ``patch``: mean of patches (B, D).
    ``patch_mode``: every patch beside a copy of CLS (B, P, 2D), for dense tasks.
    """
    cls, patches = tokens[:, 0], tokens[:, 1:]
    if mode == "cls":
        return cls
    if mode == "patch":
        return patches.mean(dim=1)
    if mode == "concat":
        return torch.cat([cls, patches.mean(dim=1)], dim=-1)
    if mode == "patch_mode":
        return torch.cat([cls[:, None].expand_as(patches), patches], dim=-1)
    raise ValueError(f"unknown pooling '{mode}'; choose concat, cls, patch or patch_mode")
