"""Pairs of images and texts that are hard to tell apart: MMVP-VLM (arXiv 2401.06209), Winoground (arXiv 2204.03162)."""

from __future__ import annotations

import torch
from torch import Tensor


def mmvp_accuracy(logits: Tensor, question_ids: Tensor, pairs_per_category: int = 15) -> Tensor:
    """Accuracy in percent per category, (ceil(P / pairs_per_category),).

    Args:
        logits: (P, 2, 2): pair, statement, image; image 0 belongs to the pair's first row.
        question_ids: (P, 2): a statement with an odd id belongs to image 0, with an even one to image 1.

    A pair counts only if both statements are matched; image 0 is chosen only if its probability exceeds one half.
    """
    chosen_first = logits.float().softmax(dim=-1)[..., 0] > 0.5
    right = (chosen_first == (question_ids % 2 == 1)).all(dim=1)
    return torch.stack([part.mean() for part in right.double().split(pairs_per_category)]) * 100


def winoground_correct(scores: Tensor) -> Tensor:
    """(N, 2, 2) similarities of caption c and image i to (N, 3) booleans: text, image and group score. Ties are wrong."""
    s = scores
    text = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    image = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    return torch.stack([text, image, text & image], dim=1)
