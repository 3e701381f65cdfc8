"""Classification: class vectors from prompts, accuracy, and the overlap of label maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_f1_score


def class_vectors(prompts: Tensor) -> Tensor:
    """Prompt embeddings (C, P, D) to class vectors (D, C): normalise, average over prompts, normalise (CLIP)."""
    return F.normalize(F.normalize(prompts, dim=-1).mean(dim=1), dim=-1).T


def descriptive_class_vectors(prompts: Tensor, counts: Sequence[int], pad_to: int = 19, normalise: bool = False) -> Tensor:
    """Prompt embeddings (sum of counts, D), class after class, to class vectors (D, C) by freeze-align's rule.

    Official: lists shorter than ``pad_to`` are filled with copies of their first prompt, and the average of the unit
    vectors is not normalised again. ``pad_to=0`` with ``normalise=True`` weighs all prompts alike, as CLIP does.
    """
    vectors = []
    for class_prompts in F.normalize(prompts, dim=-1).split(list(counts)):
        copies = max(pad_to - len(class_prompts), 0)
        vectors.append((class_prompts.sum(dim=0) + copies * class_prompts[0]) / (len(class_prompts) + copies))
    stacked = torch.stack(vectors)
    return (F.normalize(stacked, dim=-1) if normalise else stacked).T


def zero_shot_logits(image: Tensor, classes: Tensor) -> Tensor:
    """``100 * cosine`` of image embeddings (N, D) with class vectors (D, C)."""
    return 100 * F.normalize(image, dim=-1) @ classes


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share, in percent, of rows (N, C) whose label (N,) is among the ``k`` largest.

    Equal scores rank by class index; a score that is not a number ranks as if it were ahead of the label's.
    """
    true_scores = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device)[None, :] < labels[:, None]
    ahead = ~(logits <= true_scores) | ((logits == true_scores) & earlier)
    return (ahead.sum(dim=1) < k).double().mean().item() * 100


def balanced_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Mean over the classes that occur among the labels of their recall, in percent.

    torchmetrics' macro accuracy counts a class that is only predicted as well.
    """
    matrix = confusion_matrix(predicted, labels, num_classes)
    counts = matrix.sum(dim=1)
    return (matrix.diagonal().double() / counts).nanmean().item() * 100


def macro_f1(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Mean of the F1 of the classes that occur among labels or predictions, in percent."""
    return 100 * multiclass_f1_score(predicted, labels, num_classes, average="macro").item()


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int, ignore: int | None = None) -> Tensor:
    """Counts (C, C), rows are true classes, columns predictions; labels equal to ``ignore`` do not count.

    Raises ValueError for a label that is neither a class nor ``ignore``.
    """
    wrong = (labels < 0) | (labels >= num_classes)
    if ignore is not None:
        wrong &= labels != ignore
    if bool(wrong.any()):
        raise ValueError(f"there is a label {int(labels[wrong][0])}, but there are {num_classes} classes")
    return multiclass_confusion_matrix(predicted, labels, num_classes, ignore_index=ignore, validate_args=False)


def mean_iou(matrix: Tensor) -> tuple[float, Tensor]:
    """Summed confusion matrices (C, C) to the mean IoU and that of each class (C,), in percent.

    A class that never occurs is NaN, and the mean leaves it out.
    """
    right = matrix.diagonal().double()
    per_class = 100 * right / (matrix.sum(dim=0) + matrix.sum(dim=1) - right)
    return per_class.nanmean().item(), per_class
