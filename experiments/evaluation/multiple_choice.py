"""One of several candidates or classes: multiple choice, entailment, statements about image pairs."""

from __future__ import annotations

from experiments.evaluation.base import SuiteResult, TrainedSplit
from models.metrics.answers import choice_metrics, most_frequent


def multiple_choice(split: TrainedSplit) -> SuiteResult:
    """Accuracy in percent, for a second step also of the reason and of both (Q->AR), beside chance and the commonest choice;
    see :func:`~models.metrics.answers.choice_metrics`."""
    rows = split.rows("choice_predicted", "choice_labels", "choice_options")
    chance = {"choice/accuracy": (100 / rows["choice_options"].double()).mean().item()}
    majority = {"choice/accuracy": most_frequent(rows["choice_labels"])}
    if "reason_options" in rows:
        chance["choice/reason_accuracy"] = (100 / rows["reason_options"].double()).mean().item()
        both = rows["choice_options"].double() * rows["reason_options"]
        chance["choice/both_accuracy"] = (100 / both).mean().item()
        majority["choice/reason_accuracy"] = most_frequent(rows["reason_labels"])
    return SuiteResult(choice_metrics(rows), {"chance": chance, "majority": majority}, split.hashes)
