"""What pre-training learns: matching of texts with media, and masked words."""

from __future__ import annotations

from experiments.evaluation.base import SuiteResult, TrainedSplit
from models.metrics.answers import accuracies, most_frequent

TASKS = ("match", "mlm")


def pretraining(split: TrainedSplit) -> SuiteResult:
    """Matching and masked-language accuracy in percent, beside the commonest label and the commonest masked word."""
    rows = split.rows()
    metrics = accuracies(rows, TASKS)
    majority = {name: most_frequent(rows[f"{name.split('/')[0]}_labels"]) for name in metrics}
    return SuiteResult(metrics, {"majority": majority}, split.hashes)
