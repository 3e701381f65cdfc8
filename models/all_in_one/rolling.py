"""Token rolling: the parameter-free exchange of visual tokens between neighbouring frames (All-in-One, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def roll_tokens(x: Tensor, frames: int, divisor: int = 8, start: int = 0) -> Tensor:
    """Move two groups of visual tokens one frame on and one frame back, cyclically; everything else stays.

    The visual tokens are ``x[:, start:]``, L of them, the class token first. With f = L // divisor, tokens 1 ... f come
    from the previous frame and the last f tokens from the next one.

    Args:
        x: (B * frames, start + L, D), frames of one clip adjacent. Not changed.
        divisor: 8 in the released models, which moves 24 % of the visual tokens.
        start: leading tokens (text) that do not take part.

    With fewer than ``divisor`` visual tokens f is 0 and nothing moves; the official slices would then roll the whole
    sequence, class token included, which no released model does.
    """
    length = x.shape[1] - start
    fold = length // divisor
    if frames == 1 or fold == 0:
        return x
    clips = x.view(-1, frames, *x.shape[1:])
    first, last = start + 1, x.shape[1] - fold
    parts = [
        clips[:, :, :first],
        clips[:, :, first : first + fold].roll(1, dims=1),
        clips[:, :, first + fold : last],
        clips[:, :, last:].roll(-1, dims=1),
    ]
    return torch.cat(parts, dim=2).flatten(0, 1)
