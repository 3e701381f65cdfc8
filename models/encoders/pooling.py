"""How the tokens of a transformer become one vector."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["concat", "cls", "patch", "patch_mode", "mean"]
TextPooling = Literal["mean", "cls", "last"]


def pool_tokens(tokens: Tensor, mode: Pooling, prefix: int = 1) -> Tensor:
    """Tokens (B, prefix + P, D), CLS first, to image vectors (SAIL, arXiv 2412.04616, section 3.1). Not normalised.

    ``concat``: [CLS; mean of patches] (B, 2D). ``cls``: (B, D). ``patch``: mean of patches (B, D).
    ``patch_mode``: every patch beside a copy of CLS (B, P, 2D), for dense tasks. ``mean``: mean of all tokens (B, D).

    Args:
        prefix: tokens before the patches: 1 for CLS, more with registers, 0 for none.

    Raises ValueError for another mode, and for a mode that needs CLS where there is none.
    """
    cls, patches = tokens[:, 0], tokens[:, prefix:]
    if prefix == 0 and mode in ("concat", "cls", "patch_mode"):
        raise ValueError(f"pooling '{mode}' needs a CLS token and this encoder has none; choose patch")
    if mode == "cls":
        return cls
    if mode == "patch":
        return patches.mean(dim=1)
    if mode == "concat":
        return torch.cat([cls, patches.mean(dim=1)], dim=-1)
    if mode == "patch_mode":
        return torch.cat([cls[:, None].expand_as(patches), patches], dim=-1)
    if mode == "mean":
        return tokens.mean(dim=1)
    raise ValueError(f"unknown pooling '{mode}'; choose concat, cls, patch, patch_mode or mean")


def pool_text_tokens(tokens: Tensor, mask: Tensor, mode: TextPooling) -> Tensor:
    """Token states (B, L, D) with mask (B, L) to text vectors (B, D) (SAIL). Not normalised.

    ``mean``: weighted by the mask, denominator clamped at 1e-9. ``cls``: first position. ``last``: last real token, in
    left- and right-padded batches alike. Raises ValueError for another mode.
    """
    if mode == "mean":
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
    if mode == "cls":
        return tokens[:, 0]
    if mode == "last":
        # Counted from the right end, so that left padding needs no case of its own.
        last = mask.shape[1] - 1 - mask.to(torch.int64).flip(1).argmax(dim=1)
        return tokens[torch.arange(len(tokens), device=tokens.device), last]
    raise ValueError(f"unknown pooling '{mode}'; choose mean, cls or last")
