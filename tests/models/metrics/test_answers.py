"""Accuracy of open and closed questions."""

import torch

from models.metrics.answers import answer_metrics


def test_open_and_closed_questions():
    rows = {"answer_predicted": torch.zeros(4), "answer_score": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    assert answer_metrics(rows) == {"answer/score": 50.0}
    metrics = answer_metrics({**rows, "answer_open": torch.tensor([1, 0, 1, 1])})
    assert metrics["answer/score"] == 50.0 and metrics["answer/closed_score"] == 0.0
    assert round(metrics["answer/open_score"], 2) == 66.67
