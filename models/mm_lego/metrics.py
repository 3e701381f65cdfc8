"""Concordance of risks with survival times, survival curves of groups, scores at points in time, and areas under the ROC curve
(shares, not percent; those that ``*_metrics`` give are in percent).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.stats import chi2
from torch import Tensor

from models.metrics.multi_label import auroc, tied_average_precision
from models.mm_lego.batch import CENSORED, TARGETS, TIME
from models.mm_lego.survival import risk, survival_curve

ROWS = 1024  # patients that are compared with all others together


class Concordance(NamedTuple):
    """``c_index`` is NaN without a comparable pair; ``tied_time`` counts pairs of equal times, one of them censored."""

    c_index: float
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int


def concordance(risks: Tensor, times: Tensor, censored: Tensor, tolerance: float = 1e-8) -> Concordance:
    """Harrell's index: the share of comparable pairs in which the patient with the earlier event has the higher risk.

    A pair is comparable if the earlier time is an event, or if the times are equal and only one of the two is.

    Args:
        risks: (N,) higher for an earlier event.
        times: (N,) of the event or the last visit.
        censored: (N,) bool or 0 and 1.
        tolerance: risks at most this far apart are equal and count one half.
    """
    risks, censored = risks.double(), censored.bool()
    concordant = tied = comparable = tied_time = 0
    events = (~censored).nonzero().flatten()
    for rows in events.split(ROWS):
        same_time = (times[rows, None] == times) & censored
        pairs = (times[rows, None] < times) | same_time
        gaps = risks[rows, None] - risks
        equal = (gaps.abs() <= tolerance) & pairs
        tied += int(equal.sum())
        concordant += int(((gaps > 0) & pairs & ~equal).sum())
        comparable += int(pairs.sum())
        tied_time += int(same_time.sum())
    c_index = (concordant + 0.5 * tied) / comparable if comparable else float("nan")
    return Concordance(c_index, concordant, comparable - concordant - tied, tied, tied_time)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of scores (N,) and labels (N,); equal scores count one half. NaN if one class is missing."""
    return auroc(scores[:, None], positive.bool()[:, None]).item()


def macro_auc(scores: Tensor, labels: Tensor) -> float:
    """Mean over the classes of one class against the rest, of scores (N, C); NaN if a class is missing."""
    return sum(auc(scores[:, c], labels == c) for c in range(scores.shape[1])) / scores.shape[1]


def hard_binary_auc(logits: Tensor, labels: Tensor) -> float:
    """The official binary metric: the area of the predicted labels instead of the scores, which is the balanced accuracy."""
    return auc(logits.argmax(dim=1), labels.bool())


def kaplan_meier(times: Tensor, censored: Tensor) -> tuple[Tensor, Tensor]:
    """The event times (K,), rising, and the estimated probability (K,) to survive each of them."""
    events = times[~censored.bool()].unique()
    deaths, at_risk = _deaths_and_at_risk(events, times, censored)
    return events, (1 - deaths / at_risk).cumprod(dim=0)


def log_rank_p(times: Tensor, censored: Tensor, group: Tensor) -> float:
    """p-value of the log-rank test that the survival of two groups, ``group`` (N,) bool, is the same."""
    group = group.bool()
    events = times[~censored.bool()].unique()
    deaths, at_risk = _deaths_and_at_risk(events, times, censored)
    deaths_in, at_risk_in = _deaths_and_at_risk(events, times[group], censored[group])
    expected = deaths * at_risk_in / at_risk
    spread = (at_risk - deaths) / (at_risk - 1).clamp_min(1)
    variance = (expected * (1 - at_risk_in / at_risk) * spread).sum()
    return float(chi2.sf(((deaths_in - expected).sum() ** 2 / variance).item(), 1)) if variance > 0 else float("nan")


def censoring_curve(times: Tensor, censored: Tensor, at: Tensor) -> Tensor:
    """Kaplan-Meier estimate of the probability to be uncensored at the times ``at`` (T,); events come before censorings."""
    censored = censored.bool()
    moments = times[censored].unique()
    left, at_risk = _deaths_and_at_risk(moments, times, ~censored)
    at_risk = at_risk - (times[~censored] == moments[:, None]).sum(dim=1)
    curve = torch.cat([torch.ones(1, dtype=torch.float64), (1 - left / at_risk).cumprod(dim=0)])
    return curve[torch.bucketize(at, moments, right=True)]


def cumulative_auc(risks: Tensor, times: Tensor, censored: Tensor, at: Tensor) -> Tensor:
    """(T,) area under the ROC curve of "the event has happened by this time" against "it has not", for each time ``at``.

    Patients with an event are weighted by the inverse probability of not being censored, which is estimated from the same
    patients. NaN where there are no cases or no controls. The same as scikit-survival's ``cumulative_dynamic_auc``.

    Args:
        risks: (N,) higher for an earlier event.
        times: (N,) of the event or the last visit.
        censored: (N,) bool.
        at: (T,) times.
    """
    happened = ~censored.bool()
    weights = torch.where(happened, 1 / censoring_curve(times, censored, times), 0.0)
    areas = []
    for time in at:
        case, control = happened & (times <= time), times > time
        gaps = risks[case, None].double() - risks[control]
        wins = (gaps > 0).double() + 0.5 * (gaps == 0)
        areas.append((weights[case, None] * wins).sum() / (weights[case].sum() * control.sum()))
    return torch.stack(areas)


def mean_cumulative_auc(areas: Tensor, times: Tensor, censored: Tensor, at: Tensor) -> float:
    """Mean of :func:`cumulative_auc` over the times ``at``, weighted by the deaths between them (Kaplan-Meier)."""
    moments, curve = kaplan_meier(times, censored)
    survival = torch.cat([torch.ones(1, dtype=torch.float64), curve])[torch.bucketize(at, moments, right=True)]
    drops = -torch.diff(survival, prepend=torch.ones(1, dtype=torch.float64))
    return float((areas * drops).sum() / drops.sum()) if len(at) > 1 else float(areas[0])


def brier_scores(survival: Tensor, times: Tensor, censored: Tensor, at: Tensor) -> Tensor:
    """(T,) mean squared error of predicted survival probabilities (N, T) at the times ``at``, weighted for censoring.

    The same as scikit-survival's ``brier_score`` with the censoring of the same patients.
    """
    weight_of_time, weight_of_patient = (
        torch.where(curve > 0, 1 / curve, 0.0) for curve in (censoring_curve(times, censored, x) for x in (at, times))
    )
    case = (times[:, None] <= at) & ~censored.bool()[:, None]
    control = times[:, None] > at
    error = survival.square() * case * weight_of_patient[:, None] + (1 - survival).square() * control * weight_of_time
    return error.mean(dim=0)


def survival_metrics(rows: dict[str, Tensor], edges: Sequence[float]) -> dict[str, float]:
    """Percent, of rows "logits" (N, C), TIME and CENSORED: c-index, and the means over the inner edges of the bins of the
    cumulative AUC and of the Brier score. Those that are undefined (no comparable pair) are left out.
    """
    times, censored = rows[TIME].double(), rows[CENSORED]
    risks = risk(rows["logits"].double())
    metrics = {"c_index": concordance(risks, times, censored).c_index}
    at = torch.tensor(edges[1:-1], dtype=torch.float64)
    events = times[~censored]
    inside = (at >= events.min()) & (at < times.max()) if len(events) else torch.zeros(len(at), dtype=torch.bool)
    if bool(inside.any()):
        areas = cumulative_auc(risks, times, censored, at[inside])
        metrics["auc"] = mean_cumulative_auc(areas, times, censored, at[inside])
        curve = survival_curve(rows["logits"].double())[:, :-1][:, inside]
        metrics["brier"] = float(brier_scores(curve, times, censored, at[inside]).mean())
    return {f"survival/{name}": 100 * value for name, value in metrics.items() if not math.isnan(value)}


def class_metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """Percent, of rows "logits" (N, C) and "label": AUC, macro over one class against the rest beyond two classes; accuracy;
    for two classes also the official AUC of predicted labels."""
    logits, labels = rows["logits"].double(), rows["label"]
    if logits.shape[1] == 2:
        metrics = {"auc": auc(logits[:, 1] - logits[:, 0], labels), "hard_auc": hard_binary_auc(logits, labels)}
    else:
        metrics = {"auc": macro_auc(logits, labels)}
    metrics["accuracy"] = float((logits.argmax(dim=1) == labels).double().mean())
    return {f"class/{name}": 100 * value for name, value in metrics.items() if not math.isnan(value)}


def label_metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """Percent, of rows "logits" (N, C) and TARGETS: means over the labels of AUC and average precision; a label of which all
    patients, or none, are positive is left out."""
    scores, positives = rows["logits"].double(), rows[TARGETS] > 0.5
    metrics = {
        "auc": float(auroc(scores, positives).nanmean()),
        "average_precision": float(tied_average_precision(scores, positives).nanmean()),
    }
    return {f"labels/{name}": 100 * value for name, value in metrics.items() if not math.isnan(value)}


def _deaths_and_at_risk(events: Tensor, times: Tensor, censored: Tensor) -> tuple[Tensor, Tensor]:
    deaths = (events[:, None] == times[~censored.bool()]).sum(dim=1)
    return deaths.double(), (times >= events[:, None]).sum(dim=1).double()
