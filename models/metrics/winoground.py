"""Winoground (arXiv 2204.03162): does a model match two captions of the same words with the right images?"""

from __future__ import annotations

import torch
from torch import Tensor


def winoground_correct(scores: Tensor) -> Tensor:
    """(N, 2, 2) similarities of caption c and image i to (N, 3) booleans: text, image and group score. Ties are wrong."""
    s = scores
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    return torch.stack([text, image, text & image], dim=1)
