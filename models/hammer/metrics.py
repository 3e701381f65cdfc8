"""Metrics of manipulation detection and grounding, as DGM4's official evaluation counts them (shares, not percent)
and, beside them, without its quirks. Pure functions of numpy arrays and tensors; NaN where a metric is not defined.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from models.batch import IGNORE_INDEX
from models.hammer.grounding import paired_iou

EMPTY = 1e-4  # a predicted coordinate below this share of the image counts as collapsed


# ------------------------------------------------------------------------------------------------- real or manipulated


class BinaryMetrics(NamedTuple):
    auc: float
    eer: float
    accuracy: float


def binary_metrics(logits: Tensor, fake: Tensor) -> BinaryMetrics:
    """Of logits (N, 2), class 1 manipulated, and labels (N,). AUC and EER are NaN when one class is missing."""
    auc, eer = auc_and_eer(logits.softmax(dim=1)[:, 1], fake.bool())
    return BinaryMetrics(auc, eer, (logits.argmax(dim=1) == fake).double().mean().item())


def auc_and_eer(scores: Tensor, positive: Tensor) -> tuple[float, float]:
    """Area under the ROC curve, and the rate at which false alarms and misses are equal (linear between its points)."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0:
        return float("nan"), float("nan")
    scores, order = scores.double().sort(descending=True, stable=True)
    hits = positive[order].double()
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])  # of each group of equal scores
    zero = torch.zeros(1, dtype=torch.float64)
    tpr = torch.cat([zero, hits.cumsum(0)[last] / positives])
    fpr = torch.cat([zero, (1 - hits).cumsum(0)[last] / negatives])
    auc = torch.trapezoid(tpr, fpr).item()
    right = int((tpr + fpr >= 1).nonzero()[0])  # the root of 1 - x - TPR(x) lies between this point and the one before
    x0, y0, x1, y1 = (float(v) for v in (fpr[right - 1], tpr[right - 1], fpr[right], tpr[right]))
    eer = x0 + (x1 - x0) * (1 - x0 - y0) / ((x1 - x0) + (y1 - y0))
    return auc, x1 if x1 == x0 else eer


# ---------------------------------------------------------------------------------------------- kinds of manipulation


class MultiLabelMetrics(NamedTuple):
    """``op, or_, of1`` overall and ``cp, cr, cf1`` per-class precision, recall and F1. ``cf1`` is the harmonic mean of cp
    and cr, as officially; ``macro_f1`` is the mean of ``class_f1`` (C,)."""

    op: float
    or_: float
    of1: float
    cp: float
    cr: float
    cf1: float
    class_f1: Tensor
    macro_f1: float


def multi_label_metrics(logits: Tensor, labels: Tensor, top_k: int | None = None) -> MultiLabelMetrics:
    """Of logits (N, C) and labels (N, C) of 0 and 1; predicted where the logit is not negative.

    A class that is never predicted counts as one wrong prediction (official). ``top_k``: only the k largest logits of a
    sample may be predicted.
    """
    predicted = logits >= 0
    if top_k is not None:
        chosen = torch.zeros_like(predicted).scatter_(1, logits.topk(min(top_k, logits.shape[1]), dim=1).indices, True)
        predicted = predicted & chosen
    labels = labels == 1
    correct = (predicted & labels).sum(0).double()
    said, true = predicted.sum(0).double(), labels.sum(0).double()
    said[said == 0] = 1
    op, or_ = correct.sum() / said.sum(), correct.sum() / true.sum()
    precision, recall = correct / said, correct / true
    class_f1 = 2 * correct / (said + true)
    overall, per_class = _harmonic(op, or_), _harmonic(precision.mean(), recall.mean())
    averages = (op, or_, overall, precision.mean(), recall.mean(), per_class)
    o_p, o_r, o_f1, c_p, c_r, c_f1 = (float(average) for average in averages)
    return MultiLabelMetrics(o_p, o_r, o_f1, c_p, c_r, c_f1, class_f1, float(class_f1.mean()))


def _harmonic(a: Tensor, b: Tensor) -> Tensor:
    return 2 * a * b / (a + b) if float(a + b) else a.new_zeros(())


# --------------------------------------------------------------------------------------------------------------- boxes


class BoxMetrics(NamedTuple):
    """Mean overlap, and the shares of samples with more than 0.5, 0.75 and 0.95."""

    mean: float
    iou50: float
    iou75: float
    iou95: float


def evaluation_iou(predicted: Tensor, target: Tensor, official_empty_rule: bool = True) -> Tensor:
    """(N,) overlaps of paired corner boxes (N, 4); 1 where both say that nothing was manipulated.

    A prediction is empty when all its coordinates are below 1e-4. The official rule looks for an empty target at x1 alone,
    so that a real box at the left edge with an empty prediction scores 1; without it all four coordinates must be 0.
    """
    iou = torch.nan_to_num(paired_iou(predicted, target)[0], nan=0.0)
    nothing = target[:, 0] == 0 if official_empty_rule else (target == 0).all(dim=1)
    return torch.where(nothing & (predicted < EMPTY).all(dim=1), torch.ones_like(iou), iou)


def box_metrics(iou: Tensor) -> BoxMetrics:
    """Summary of overlaps (N,); thresholds are strict."""
    if not len(iou):
        return BoxMetrics(*[float("nan")] * 4)
    iou = iou.double()
    return BoxMetrics(*(v.double().mean().item() for v in (iou, iou > 0.5, iou > 0.75, iou > 0.95)))


def grounding_iou(predicted: Tensor, target: Tensor, official_empty_rule: bool = True) -> Tensor:
    """:func:`evaluation_iou` of centre boxes (N, 4)."""
    predicted, target = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (predicted, target))
    return evaluation_iou(predicted, target, official_empty_rule)


# -------------------------------------------------------------------------------------------------------------- tokens


class TokenMetrics(NamedTuple):
    precision: float
    recall: float
    f1: float
    accuracy: float


def token_metrics(predicted: Tensor, labels: Tensor) -> TokenMetrics:
    """Micro counts over all tokens whose label is not IGNORE_INDEX; ``predicted`` and ``labels`` of one shape, 1 manipulated.

    Precision without a positive prediction, recall without a positive label and F1 without either are NaN.
    """
    labelled = labels != IGNORE_INDEX
    predicted, labels = predicted[labelled] == 1, labels[labelled] == 1
    correct, said, true = (int(x.sum()) for x in (predicted & labels, predicted, labels))
    precision, recall = _ratio(correct, said), _ratio(correct, true)
    accuracy = _ratio(int((predicted == labels).sum()), len(labels))
    return TokenMetrics(precision, recall, _ratio(2 * correct, said + true), accuracy)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
