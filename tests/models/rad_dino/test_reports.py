"""Reports: the model that writes them, and the rule that reads findings out of them."""

import pytest
import torch

from models.batch import IGNORE_INDEX
from models.rad_dino.reports import ReportModel, named_findings, report_metrics, small_writer, train_reports

NAMES = ["Cardiomegaly", "Effusion", "Nodule"]
TEXTS = ["the heart is enlarged. there is no nodule.", "the heart is not enlarged. there is a nodule."]


def test_reports_follow_the_image():
    torch.manual_seed(0)
    model = ReportModel(8, small_writer(TEXTS, width=32, layers=1, heads=2))
    patches = torch.randn(2, 3, 8)
    before = model(patches, model.tokens(TEXTS)).item()
    train_reports(model, patches, TEXTS, steps=60, batch_size=4, lr=1e-2, seed=0)
    assert model(patches, model.tokens(TEXTS)).item() < before / 4
    assert model.write(patches, longest=30) == TEXTS
    assert model.write(patches.flip(0), longest=3) == ["the heart is", "the heart is"]


def test_padding_is_not_learnt_from():
    torch.manual_seed(0)
    model, patches = ReportModel(8, small_writer(TEXTS, width=16, layers=1, heads=2)).eval(), torch.randn(2, 3, 8)
    ids = model.tokens(["the heart", TEXTS[1]])
    assert (ids[0, 3:] == IGNORE_INDEX).all()
    each = [model(patches[i : i + 1], ids[i : i + 1, :n]) * n for i, n in ((0, 3), (1, ids.shape[1]))]
    torch.testing.assert_close(model(patches, ids), sum(each) / (3 + ids.shape[1]))


@pytest.mark.parametrize(
    ("report", "present"),
    [
        (TEXTS[0], [1, 0, 0]),
        (TEXTS[1], [0, 0, 1]),
        ("Small left pleural effusion.\nHeart size is normal without cardiomegaly", [0, 1, 0]),
        ("", [0, 0, 0]),
    ],
)
def test_findings_are_read_with_negations(report, present):
    assert named_findings(report, NAMES) == present


def test_report_metrics():
    same = report_metrics(TEXTS, TEXTS, NAMES)
    assert list(same.values()) == pytest.approx([100.0] * 4)
    swapped = report_metrics(TEXTS[::-1], TEXTS, NAMES)
    assert swapped["findings_f1_micro"] == swapped["findings_f1_macro"] == 0 and swapped["rouge_l"] > 50
    assert report_metrics(TEXTS, TEXTS, NAMES, labels=lambda report, names: [1, 1, 0])["findings_f1_micro"] == 100
