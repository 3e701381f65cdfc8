"""Metrics of whole splits against scikit-survival and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_auroc,
    multilabel_auroc,
    multilabel_average_precision,
)

from models.batch import LABEL
from models.mm_lego.batch import CENSORED, TARGETS, TIME
from models.mm_lego.metrics import (
    brier_scores,
    class_metrics,
    concordance,
    cumulative_auc,
    kaplan_meier,
    label_metrics,
    log_rank_p,
    mean_cumulative_auc,
    survival_metrics,
)
from models.mm_lego.survival import risk, survival_curve

AT = np.array([3.0, 7.0, 12.5, 20.0])


@pytest.fixture
def patients():
    """Tied risks and times, some of them censored; times, censored, risks, and the truth as scikit-survival takes it."""
    rng = np.random.default_rng(0)
    times, censored, risks = rng.integers(1, 25, 90).astype(float), rng.random(90) < 0.4, rng.integers(0, 9, 90).astype(float)
    censored[times == times.max()] = False
    truth = np.array([*zip(~censored, times, strict=True)], dtype=[("event", bool), ("time", float)])
    return torch.tensor(times), torch.tensor(censored), torch.tensor(risks), truth


def test_scores_in_time_are_those_of_scikit_survival(patients):
    metrics = pytest.importorskip("sksurv.metrics")
    times, censored, risks, truth = patients
    areas, mean = metrics.cumulative_dynamic_auc(truth, truth, risks.numpy(), AT)
    ours = cumulative_auc(risks, times, censored, torch.tensor(AT))
    np.testing.assert_allclose(ours, areas, rtol=1e-9)
    assert mean_cumulative_auc(ours, times, censored, torch.tensor(AT)) == pytest.approx(mean)
    survival = torch.rand(90, 4, generator=torch.Generator().manual_seed(0)).double().sort(1, descending=True).values
    theirs = metrics.brier_score(truth, truth, survival.numpy(), AT)[1]
    np.testing.assert_allclose(brier_scores(survival, times, censored, torch.tensor(AT)), theirs, rtol=1e-9)
    c_index, concordant, discordant, tied_risk, tied_time = metrics.concordance_index_censored(
        truth["event"], truth["time"], risks.numpy()
    )
    result = concordance(risks, times, censored)
    assert result.c_index == pytest.approx(c_index)
    assert (result.concordant, result.discordant, result.tied_risk) == (concordant, discordant, tied_risk)


def test_curves_and_their_difference_are_those_of_scikit_survival(patients):
    nonparametric, compare = pytest.importorskip("sksurv.nonparametric"), pytest.importorskip("sksurv.compare")
    times, censored, risks, truth = patients
    at, curve = kaplan_meier(times, censored)
    their_times, their_curve = nonparametric.kaplan_meier_estimator(truth["event"], truth["time"])
    np.testing.assert_allclose(curve, their_curve[np.searchsorted(their_times, at.numpy())])
    group = risks > 4
    assert log_rank_p(times, censored, group) == pytest.approx(compare.compare_survival(truth, group.numpy())[1])


def test_survival_metrics_of_rows(patients):
    metrics = pytest.importorskip("sksurv.metrics")
    times, censored, _, truth = patients
    logits = torch.randn(90, 4, generator=torch.Generator().manual_seed(1))
    found = survival_metrics({"logits": logits, TIME: times.float(), CENSORED: censored}, (0.0, 5.0, 10.0, 15.0, 25.0))
    at, curve = np.array([5.0, 10.0, 15.0]), survival_curve(logits.double())[:, :3].numpy()
    risks = risk(logits.double()).numpy()
    assert found["survival/c_index"] == pytest.approx(
        100 * metrics.concordance_index_censored(truth["event"], truth["time"], risks)[0]
    )
    assert found["survival/auc"] == pytest.approx(100 * metrics.cumulative_dynamic_auc(truth, truth, risks, at)[1])
    assert found["survival/brier"] == pytest.approx(100 * metrics.brier_score(truth, truth, curve, at)[1].mean())


def test_undefined_survival_metrics_are_left_out():
    rows = {"logits": torch.randn(3, 4), TIME: torch.tensor([1.0, 2, 3]), CENSORED: torch.ones(3, dtype=torch.bool)}
    assert survival_metrics(rows, (0.0, 1.5, 2.0, 2.5, 4.0)) == {}


def test_metrics_of_classes_and_labels_are_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 3, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    found = class_metrics({"logits": logits, LABEL: labels})
    # torchmetrics' multiclass form ranks softmax probabilities, the official metric ranks the scores of each class.
    ranked = [binary_auroc(logits[:, c].sigmoid(), (labels == c).long()) for c in range(3)]
    assert found["class/auc"] == pytest.approx(100 * float(torch.stack(ranked).mean()), rel=1e-5)
    binary = class_metrics({"logits": logits[:, :2], LABEL: labels.clamp(max=1)})
    probability = logits[:, :2].softmax(dim=1)[:, 1]
    assert binary["class/auc"] == pytest.approx(100 * float(binary_auroc(probability, labels.clamp(max=1))), rel=1e-5)
    hard = binary_auroc(logits[:, :2].argmax(dim=1).float(), labels.clamp(max=1))
    assert binary["class/hard_auc"] == pytest.approx(100 * float(hard), rel=1e-5)
    targets = torch.rand(60, 3, generator=generator) < 0.3
    several = label_metrics({"logits": logits, TARGETS: targets.float()})
    assert several["labels/auc"] == pytest.approx(100 * float(multilabel_auroc(logits, targets.long(), 3)), rel=1e-5)
    precision = multilabel_average_precision(logits, targets.long(), 3)
    assert several["labels/average_precision"] == pytest.approx(100 * float(precision), rel=1e-5)
