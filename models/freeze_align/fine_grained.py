"""Fine-grained contrast between the words of a text and the patches of its image (SPARC, arXiv 2401.09865).

As in freeze-align's code, where its weight is 0 in the released runs: the authors found no benefit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fine_grained_loss(
    patches: Tensor, words: Tensor, mask: Tensor, temperature: Tensor, threshold: float | None = None
) -> Tensor:
    """Each word is told apart from the other words of its text by the patches it attends to, and the reverse.

    Args:
        patches: projected patches (B, N, E) without CLS, not normalised.
        words: projected tokens (B, L, E), not normalised.
        mask: (B, L), True for the words that count: all but the special tokens.
        temperature: scalar that divides the cosines.
        threshold: attention below it is 0, after scaling each word's to [0, 1]; None: 1 / N.
    """
    threshold = 1 / patches.shape[1] if threshold is None else threshold
    # At least in float32: half precision holds neither the masked logits nor the number of words.
    patches, words = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (patches, words))
    with torch.autocast(words.device.type, enabled=False):
        mask = mask.to(words.dtype)
        attention = words @ patches.transpose(1, 2)
        low, high = attention.amin(dim=-1, keepdim=True), attention.amax(dim=-1, keepdim=True)
        attention = (attention - low) / (high - low)
        attention = torch.where(attention < threshold, 0.0, attention)
        grouped = (attention / attention.sum(dim=-1, keepdim=True)) @ patches
        logits = F.normalize(grouped, dim=-1) @ F.normalize(words, dim=-1).transpose(1, 2) / temperature
        return (_own_word(logits, mask) + _own_word(logits.transpose(1, 2), mask)) / 2


def inner_words(mask: Tensor) -> Tensor:
    """Which tokens of right-padded texts with this mask (B, L) are words: all but the first and the last real one."""
    after = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    counts = mask.bool() & after.bool()
    counts[:, 0] = False
    return counts


def _own_word(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of (B, L, L) logits with the diagonal, columns and rows restricted to the words that count."""
    logits = logits.masked_fill(mask[:, None, :] == 0, -1e9)
    target = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    loss = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    return (loss * mask).sum() / mask.sum()
