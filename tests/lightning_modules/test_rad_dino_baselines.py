"""Encoders that learn from findings or reports."""

from functools import partial

import pytest
import torch

from lightning_modules.rad_dino_baselines import ReportVectors, SupervisedRadiographs, report_contrast
from models.errors import UserError
from models.rad_dino.backbone import DinoViT
from models.rad_dino.batch import FINDINGS, GLOBAL_CROPS, REPORT

BACKBONE = partial(DinoViT, 16, 8, 16, 1, 2, init_values=1.0)


@pytest.mark.parametrize("labels", ["findings", "reports"])
def test_a_batch_is_learnt(labels):
    torch.manual_seed(0)
    module = SupervisedRadiographs(BACKBONE, labels=labels, num_findings=2)
    reports = ["no nodule.", "a nodule.", "effusion.", "no nodule."]
    crops = torch.randn(4, 1, 3, 16, 16)
    crops[3] = crops[0]
    batch = {GLOBAL_CROPS: crops, FINDINGS: torch.tensor([[0, 0], [1, 0], [0, 1], [0, -1]]), REPORT: reports}
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        (loss,) = module.shared_step(batch, "train").losses.values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    floor = 2 * torch.tensor(2.0).log().item() / 4 if labels == "reports" else 0.0  # two reports are equal
    assert losses[-1] - floor < 0.2 * (losses[0] - floor)


def test_unknown_findings_do_not_count():
    module = SupervisedRadiographs(BACKBONE, num_findings=2)
    batch = {GLOBAL_CROPS: torch.randn(2, 1, 3, 16, 16), FINDINGS: torch.full((2, 2), -1), REPORT: ["", ""]}
    assert module.shared_step(batch, "train").losses["findings"] == 0
    with pytest.raises(UserError, match="has none"):
        SupervisedRadiographs(BACKBONE, num_findings=0)


def test_equal_reports_share_the_match():
    images = torch.eye(3)
    reports = torch.stack([images[0], images[1], images[0]])
    loss = report_contrast(images, reports, ["a", "b", "a"], torch.tensor(5.0))
    log_rows, log_columns = (5 * images @ reports.T).log_softmax(1), (5 * images @ reports.T).log_softmax(0)
    same = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    torch.testing.assert_close(loss, -((same * log_rows).sum() + (same * log_columns).sum()) / 6)


def test_an_empty_report_has_a_vector():
    vectors = ReportVectors(4, buckets=16)(["", "a nodule", "A nodule"])
    assert torch.isfinite(vectors).all() and torch.equal(vectors[1], vectors[2])
