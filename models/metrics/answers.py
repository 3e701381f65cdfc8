"""Accuracy of answers, choices and word predictions, from the rows that ``predict_step`` gives.

Every task has a name, which its rows begin with: ``<task>_predicted`` and ``<task>_labels``, (N,) or (N, L) int64, the latter
-100 where there is no known target.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.batch import IGNORE_INDEX


def percent(hits: Tensor) -> float:
    """Share of True in percent; NaN of nothing."""
    return hits.double().mean().item() * 100


def hits(rows: Mapping[str, Tensor], task: str) -> Tensor:
    """(n,) bool for each known target of ``task``: whether it was predicted."""
    labels = rows[f"{task}_labels"]
    known = labels != IGNORE_INDEX
    return rows[f"{task}_predicted"][known] == labels[known]


def accuracies(rows: Mapping[str, Tensor], tasks: tuple[str, ...]) -> dict[str, float]:
    """``<task>/accuracy`` in percent over the known targets of each of ``tasks`` that has rows and any such target."""
    known = {task: hits(rows, task) for task in tasks if f"{task}_labels" in rows}
    return {f"{task}/accuracy": percent(right) for task, right in known.items() if len(right)}


def answer_metrics(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Open-ended questions, in percent.

    ``answer/accuracy`` is over all questions, an answer outside the vocabulary counting as wrong;
    ``answer/filtered_accuracy`` leaves those questions out (All-in-One, official code). Where the targets are soft,
    ``answer/score`` is the mean target of the predicted answers (VQA).

    Args:
        rows: ``answer_predicted`` and ``answer_labels`` (N,), or ``answer_predicted`` and ``answer_score`` (N,) in [0, 1].
            With ``answer_open`` (N,), 1 at open questions and 0 at closed ones, ``answer/open_score`` and
            ``answer/closed_score`` stand beside ``answer/score`` (medical VQA).
    """
    metrics: dict[str, float] = {}
    if "answer_labels" in rows:
        metrics["answer/accuracy"] = percent(rows["answer_predicted"] == rows["answer_labels"])
        metrics["answer/filtered_accuracy"] = percent(hits(rows, "answer"))
    if "answer_score" in rows:
        metrics["answer/score"] = percent(rows["answer_score"])
        if "answer_open" in rows:
            is_open = rows["answer_open"].bool()
            metrics["answer/open_score"] = percent(rows["answer_score"][is_open])
            metrics["answer/closed_score"] = percent(rows["answer_score"][~is_open])
    return metrics


def choice_metrics(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Multiple choice and classification of pairs, in percent over the known targets.

    Args:
        rows: ``choice_predicted`` and ``choice_labels`` (N,); for VCR also ``reason_predicted`` and ``reason_labels`` of the
            second step. ``choice/both_accuracy`` is then the share of samples with both right (Q->AR).
    """
    metrics = {"choice/accuracy": percent(hits(rows, "choice"))}
    if "reason_labels" in rows:
        known = (rows["choice_labels"] != IGNORE_INDEX) & (rows["reason_labels"] != IGNORE_INDEX)
        right = {name: (rows[f"{name}_predicted"] == rows[f"{name}_labels"])[known] for name in ("choice", "reason")}
        metrics["choice/reason_accuracy"] = percent(right["reason"])
        metrics["choice/both_accuracy"] = percent(right["choice"] & right["reason"])
    return metrics


def most_frequent(labels: Tensor) -> float:
    """Share in percent of the commonest of the known ``labels``: what saying the same every time reaches."""
    known = labels[labels != IGNORE_INDEX]
    return 100 * torch.bincount(known).max().item() / len(known) if len(known) else float("nan")
