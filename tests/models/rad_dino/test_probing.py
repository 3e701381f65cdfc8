"""Metrics with ties against scikit-learn, and what the probes promise."""

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from models.metrics.multi_label import auroc, bootstrap_interval, tied_average_precision
from models.rad_dino.backbone import DinoViT
from models.rad_dino.probing import (
    known_metrics,
    neighbour_metrics,
    neighbour_scores,
    probe_features,
    train_linear_probes,
)


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 12, (80, 3), generator=generator).float(), torch.rand(80, 3, generator=generator) < 0.4


def test_ties_are_joined_as_in_scikit_learn(scored):
    scores, positives = scored
    for c in range(3):
        truth, score = positives[:, c].numpy(), scores[:, c].numpy()
        assert auroc(scores, positives)[c].item() == pytest.approx(roc_auc_score(truth, score))
        assert tied_average_precision(scores, positives)[c].item() == pytest.approx(average_precision_score(truth, score))


def test_labels_without_both_classes_are_nan(scored):
    scores = scored[0]
    assert torch.isnan(auroc(scores, torch.ones_like(scores, dtype=torch.bool))).all()
    assert torch.isnan(tied_average_precision(scores, torch.zeros_like(scores, dtype=torch.bool))).all()


def test_interval_holds_the_value(scored):
    low, high = bootstrap_interval(auroc, *scored, draws=50)
    assert low < auroc(*scored).mean() < high


def test_unknown_findings_do_not_count(scored):
    scores, positives = scored
    findings = positives.long()
    findings[:20] = -1
    area, precision = known_metrics(scores, findings)
    torch.testing.assert_close(area, 100 * auroc(scores[20:], positives[20:]))
    torch.testing.assert_close(precision, 100 * tied_average_precision(scores[20:], positives[20:]))


def two_groups(count=200):
    generator = torch.Generator().manual_seed(0)
    findings = torch.randint(0, 2, (count, 2), generator=generator)
    features = torch.randn(count, 6, generator=generator) + 4 * torch.nn.functional.pad(findings.float(), (0, 4))
    return features, findings


def test_probes_find_separable_findings():
    features, findings = two_groups()
    probes = train_linear_probes(features, findings, rates=(1e-5, 0.5), steps=200)
    areas = [known_metrics(scores, findings)[0].mean().item() for scores in probes.scores(features)]
    assert areas[1] > 97 and areas[1] > areas[0]
    assert known_metrics(neighbour_scores(features, findings, features), findings)[0].mean() > 90
    assert neighbour_metrics({"features": features, "findings": findings})["knn/auroc"] > 85


def test_written_gradient_is_autograds():
    features, findings = two_groups(40)
    findings[:5, 0] = -1
    probes = train_linear_probes(features, findings, rates=(0.3,), steps=1, batch_size=40)
    generator = torch.Generator().manual_seed(0)
    weight = (0.01 * torch.randn(6, 2, generator=generator)).requires_grad_()
    rows = torch.randint(40, (40,), generator=generator)
    x, y = features[rows], findings[rows]
    known = y >= 0
    loss = torch.nn.functional.binary_cross_entropy_with_logits((x @ weight)[known], y[known].float())
    loss.backward()
    torch.testing.assert_close(probes.weight[0], (weight - 0.3 * 40 / 256 * weight.grad).detach())


def test_collapsed_features_have_rank_one():
    metrics = neighbour_metrics({"features": torch.ones(8, 4), "findings": torch.zeros(8, 0, dtype=torch.int64)})
    assert metrics == {"features/effective_rank": pytest.approx(1.0, abs=0.01)}


def test_features_are_those_of_the_last_blocks():
    encoder = DinoViT(32, 8, 24, 3, 2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, output = probe_features(encoder, images), encoder(images)
    assert {name: value.shape[1] for name, value in features.items()} == {
        "1_cls": 24, "1_cls_patches": 48, "4_cls": 72, "4_cls_patches": 96,
    }  # fmt: skip
    torch.testing.assert_close(features["1_cls"], output.cls)
    torch.testing.assert_close(features["1_cls_patches"][:, 24:], output.patches.mean(1))
