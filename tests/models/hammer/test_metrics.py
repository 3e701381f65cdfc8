import math

import pytest
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn import metrics as sklearn_metrics

from models.batch import IGNORE_INDEX
from models.hammer.metrics import (
    auc_and_eer,
    binary_metrics,
    box_metrics,
    evaluation_iou,
    multi_label_metrics,
    token_metrics,
)
from models.metrics.average_precision import average_precision


@pytest.mark.parametrize("seed", range(6))
def test_auc_and_eer_equal_sklearn(seed):
    torch.manual_seed(seed)
    scores, positive = torch.rand(80, dtype=torch.float64), torch.rand(80) > 0.4
    scores = scores.round(decimals=1) if seed % 2 else scores + 0.3 * positive  # with ties, or informative
    fpr, tpr, _ = sklearn_metrics.roc_curve(positive, scores)
    auc, eer = auc_and_eer(scores, positive)
    assert auc == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores))
    assert eer == pytest.approx(brentq(lambda x: 1 - x - interp1d(fpr, tpr)(x), 0.0, 1.0), abs=1e-9)


def test_perfect_and_single_class():
    assert auc_and_eer(torch.tensor([0.1, 0.9]), torch.tensor([False, True])) == (1.0, 0.0)
    found = binary_metrics(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([1, 1]))
    assert math.isnan(found.auc) and math.isnan(found.eer)
    assert found.accuracy == 0.5  # a tie is called pristine


def test_kinds_equal_sklearn():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4), torch.randint(0, 2, (50, 4))
    predicted = (logits >= 0).long()
    found = multi_label_metrics(logits, labels)
    assert found.of1 == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="micro"))
    assert found.macro_f1 == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
    precision = sklearn_metrics.precision_score(labels, predicted, average="macro")
    recall = sklearn_metrics.recall_score(labels, predicted, average="macro")
    assert found.cf1 == pytest.approx(2 * precision * recall / (precision + recall))
    expected = [sklearn_metrics.average_precision_score(labels[:, k], logits[:, k]) for k in range(4)]
    assert (average_precision(logits, labels == 1) / 100).tolist() == pytest.approx(expected, rel=1e-5)


def test_top_k_and_a_class_that_is_never_predicted():
    logits = torch.tensor([[3.0, 2.0, 1.0], [-1.0, -1.0, 5.0]])
    labels = torch.tensor([[1, 1, 1], [0, 0, 1]])
    assert multi_label_metrics(logits, labels).or_ == 1
    assert multi_label_metrics(logits, labels, top_k=1).or_ == 0.5
    never = multi_label_metrics(torch.tensor([[1.0, -1.0]]), torch.tensor([[1, 1]]))
    assert (never.cp, never.cr) == (0.5, 0.5)
    assert never.op == 0.5  # officially the missing prediction counts as a wrong one
    assert average_precision(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)).isnan().all()


def test_empty_boxes():
    target = torch.tensor([[0.0, 0, 0, 0], [0.0, 0, 0, 0], [0.0, 0.2, 0.5, 0.5], [0.2, 0.2, 0.5, 0.5]])
    predicted = torch.tensor([[0.0, 0, 0, 5e-5], [0.0, 0, 0.1, 0.1], [0.0, 0, 0, 0], [0.2, 0.2, 0.5, 0.5]])
    assert evaluation_iou(predicted, target).tolist() == [1, 0, 1, 1]
    assert evaluation_iou(predicted, target, official_empty_rule=False).tolist() == [1, 0, 0, 1]
    found = box_metrics(torch.tensor([0.5, 0.76, 1.0]))
    assert (found.iou50, found.iou75, found.iou95) == pytest.approx((2 / 3, 2 / 3, 1 / 3))
    assert math.isnan(box_metrics(torch.empty(0)).mean)


def test_tokens_equal_sklearn():
    torch.manual_seed(0)
    predicted, labels = torch.randint(0, 2, (8, 9)), torch.randint(0, 2, (8, 9))
    labels[:, 6:] = IGNORE_INDEX
    flat, truth = predicted[:, :6].flatten(), labels[:, :6].flatten()
    found = token_metrics(predicted, labels)
    p, r, f, _ = sklearn_metrics.precision_recall_fscore_support(truth, flat, average="binary")
    assert found[:3] == pytest.approx((p, r, f))
    assert found.accuracy == pytest.approx(sklearn_metrics.accuracy_score(truth, flat))
    assert math.isnan(token_metrics(torch.zeros(1, 3), torch.ones(1, 3)).precision)
