"""Token grounding with a momentum teacher (HAMMER, arXiv 2304.02556, section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import IGNORE_INDEX


def token_grounding(
    logits: Tensor, labels: Tensor, teacher: Tensor | None = None, alpha: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """``(1 - alpha) CE + alpha KD``, both means over the tokens of the batch that are not padding; CE alone without teacher.

    Args:
        logits, teacher: (B, T, 2) of the online and the momentum model. ``KD = -sum_c softmax(teacher)_c log p_c``.
        labels: (B, T), 1 manipulated, 0 not, IGNORE_INDEX padding.
        label_smoothing: of CE.
    """
    logits = logits.float()
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing)
    if teacher is None:
        return ce
    kept = labels != IGNORE_INDEX
    kd = -(teacher.detach().float().softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return (1 - alpha) * ce + alpha * torch.where(kept, kd, 0.0).sum() / kept.sum()
