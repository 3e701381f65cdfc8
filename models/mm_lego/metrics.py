"""Concordance of risks with survival times, survival curves of groups, and areas under the ROC curve (shares, not percent)."""

from __future__ import annotations

from typing import NamedTuple

from scipy.stats import chi2
from torch import Tensor

from models.metrics.multi_label import auroc

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


def _deaths_and_at_risk(events: Tensor, times: Tensor, censored: Tensor) -> tuple[Tensor, Tensor]:
    deaths = (events[:, None] == times[~censored.bool()]).sum(dim=1)
    return deaths.double(), (times >= events[:, None]).sum(dim=1).double()
