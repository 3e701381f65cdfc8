"""How often a glance network names the right class: the metrics of validation and of the evaluation suite."""

from __future__ import annotations

from torch import Tensor

from models.metrics.average_precision import mean_average_precision
from models.metrics.classification import top_k_accuracy


def glance_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5 and mAP in percent.

    Args:
        logits: (N, C) after the last snippet.
        labels: (N, L) classes, padded with negative numbers; the first one counts for top-k.
    """
    metrics = {f"top{k}": top_k_accuracy(logits, labels[:, 0], k) for k in (1, 5) if k < logits.shape[1]}
    return {**metrics, "mAP": mean_average_precision(logits.softmax(dim=1), labels)}
