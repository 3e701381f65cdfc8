"""Padding of texts: what to cut off and what to leave out of account."""

from __future__ import annotations

from torch import Tensor


def trim(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a batch (..., L) to its longest text: padding is masked as a key, so that no other token can notice."""
    longest = max(int(mask.sum(dim=-1).max()), 1)
    if not bool(mask[..., longest:].any()):  # texts are padded on the right
        return ids[..., :longest], mask[..., :longest]
    return ids, mask


def content_mask(mask: Tensor) -> Tensor:
    """(B, L) bool: real tokens but for the first ([CLS]) and the last ([SEP])."""
    content = mask.bool().clone()
    content[:, 0] = False
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    return content.scatter(1, last[:, None], False)
