import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, norm

from models.errors import UserError
from models.mm_lego.metrics import auc, concordance, hard_binary_auc, kaplan_meier, log_rank_p, macro_auc
from models.mm_lego.survival import class_weights, l1_penalty, survival_bins, survival_nll


def patients(count=60, tied=True):
    rng = np.random.default_rng(0)
    times = rng.integers(1, 15, count) if tied else rng.permutation(count) + 1
    risks = rng.integers(0, 12, count) if tied else rng.normal(size=count)
    return torch.as_tensor(risks).float(), torch.as_tensor(times), torch.as_tensor(rng.random(count) < 0.4)


@pytest.mark.parametrize("tied", [True, False])
def test_concordance_equals_counting_pairs(tied, monkeypatch):
    monkeypatch.setattr("models.mm_lego.metrics.ROWS", 7)
    risks, times, censored = patients(tied=tied)
    counts = {"concordant": 0, "discordant": 0, "tied_risk": 0, "tied_time": 0}
    for i in range(len(risks)):
        for j in range(len(risks)):
            same = bool(times[i] == times[j] and censored[j])
            if not censored[i] and (times[i] < times[j] or same):
                counts["tied_time"] += same
                kind = "tied_risk" if risks[i] == risks[j] else "concordant" if risks[i] > risks[j] else "discordant"
                counts[kind] += 1
    result = concordance(risks, times, censored)
    assert {name: getattr(result, name) for name in counts} == counts
    pairs = counts["concordant"] + counts["discordant"] + counts["tied_risk"]
    assert result.c_index == pytest.approx((counts["concordant"] + counts["tied_risk"] / 2) / pairs)


def test_concordance_without_pairs_is_not_a_number():
    assert np.isnan(concordance(torch.rand(3), torch.ones(3), torch.ones(3)).c_index)


def test_nll_equals_the_sum_over_patients():
    torch.manual_seed(0)
    logits, bins, censored = torch.randn(9, 4).double(), torch.arange(9) % 4, torch.arange(9) % 3 == 0
    weights = torch.tensor([1.0, 2, 3, 4])
    total = 0.0
    for i in range(9):
        hazards = logits[i].sigmoid()
        curve = [1.0] + [float((1 - hazards[: k + 1]).prod()) for k in range(4)]
        y = int(bins[i])
        event = 0.0 if censored[i] else -np.log(curve[y]) - np.log(float(hazards[y]))
        censoring = -np.log(curve[y + 1]) if censored[i] else 0.0
        total += 0.7 * (event + censoring) * float(weights[y] / 10) + 0.3 * event
    result = survival_nll(logits, bins, censored, alpha=0.3, class_weights=weights)
    assert float(result) == pytest.approx(total / 9, rel=1e-6)


def test_nll_of_certain_hazards_is_finite():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    survival_nll(logits, torch.tensor([1, 1]), torch.tensor([0, 1])).backward()
    assert logits.grad.isfinite().all()


def test_bins_hold_equal_shares_of_the_events_and_all_patients():
    months = torch.arange(1.0, 101)
    censored = torch.arange(100) % 2 == 1
    bins, edges = survival_bins(months, censored, 4)
    counts = torch.bincount(bins[~censored])
    assert int(counts.sum()) == 50 and int(counts.max() - counts.min()) <= 1
    assert edges[0] < 1 and edges[-1] > 100 and int(bins.min()) == 0 and int(bins.max()) == 3
    on_edge, _ = survival_bins(torch.tensor([1.0, 2, 3, 4, 5]), torch.zeros(5), 2)
    assert on_edge.tolist() == [0, 0, 1, 1, 1]  # a bin holds its left edge
    with pytest.raises(UserError, match="fewer bins"):
        survival_bins(torch.ones(10), torch.zeros(10), 4)


def test_class_weights_need_every_class():
    torch.testing.assert_close(class_weights(torch.tensor([0, 0, 0, 0, 1]), 2, "inverse_root"), torch.tensor([0.5, 1.0]))
    with pytest.raises(UserError, match=r"\[2\]"):
        class_weights(torch.tensor([0, 1]), 3, "inverse")


def test_areas_equal_the_rank_statistic():
    torch.manual_seed(0)
    scores, labels = (torch.randn(50, 3) * 5).round(), torch.arange(50) % 3
    areas = []
    for c in range(3):
        positive, negative = scores[labels == c, c].numpy(), scores[labels != c, c].numpy()
        areas.append(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
        assert auc(scores[:, c], labels == c) == pytest.approx(areas[-1])
    assert macro_auc(scores, labels) == pytest.approx(np.mean(areas))
    hits = scores[:, :2].argmax(dim=1) == (labels == 1)
    recalls = [hits[(labels == 1) == of].double().mean().item() for of in (True, False)]
    assert hard_binary_auc(scores[:, :2], labels == 1) == pytest.approx(np.mean(recalls))
    assert np.isnan(auc(scores[:, 0], torch.ones(50, dtype=torch.bool)))


def test_kaplan_meier_and_log_rank_equal_sums_over_times():
    _, times, censored = patients()
    group = torch.arange(60) % 3 == 0
    events, curve = kaplan_meier(times, censored)
    observed = expected = variance = 0.0
    alive = 1.0
    for t, value in zip(events.tolist(), curve.tolist(), strict=True):
        n, d = int((times >= t).sum()), int(((times == t) & ~censored).sum())
        n1, d1 = int((times >= t)[group].sum()), int(((times == t) & ~censored)[group].sum())
        alive *= 1 - d / n
        assert value == pytest.approx(alive)
        observed, expected = observed + d1, expected + d * n1 / n
        variance += d * n1 / n * (1 - n1 / n) * ((n - d) / (n - 1) if n > 1 else 1)
    z = (observed - expected) / variance**0.5
    assert log_rank_p(times, censored, group) == pytest.approx(2 * norm.sf(abs(z)))


def test_l1_penalty_and_its_gradient():
    parameters = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([[-3.0]], requires_grad=True)]
    penalty = l1_penalty(parameters)
    penalty.backward()
    assert float(penalty) == 6 and parameters[0].grad.tolist() == [1, -1]
