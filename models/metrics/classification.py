"""Zero-shot classification: class vectors from prompts, and accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def class_vectors(prompts: Tensor) -> Tensor:
    """Prompt embeddings (C, P, D) to class vectors (D, C): normalise, average over prompts, normalise (CLIP)."""
    return F.normalize(F.normalize(prompts, dim=-1).mean(dim=1), dim=-1).T


def zero_shot_logits(image: Tensor, classes: Tensor) -> Tensor:
    """``100 * cosine`` of image embeddings (N, D) with class vectors (D, C)."""
    return 100 * F.normalize(image, dim=-1) @ classes


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share, in percent, of rows (N, C) whose label (N,) is among the ``k`` largest.

    Equal scores rank by class index; a score that is not a number ranks as if it were ahead of the label's.
    """
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device)[None, :] < labels[:, None]
    ahead = ~(logits <= own) | ((logits == own) & earlier)
    return (ahead.sum(dim=1) < k).double().mean().item() * 100


def balanced_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Mean over the classes that occur of their recall, in percent."""
    counts = torch.bincount(labels, minlength=classes)
    right = torch.bincount(labels[predicted == labels], minlength=classes)
    present = counts > 0
    return (right[present].double() / counts[present]).mean().item() * 100


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (C, C), rows are true classes, columns predictions."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
