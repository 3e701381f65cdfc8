import pytest
import torch
from sklearn.metrics import jaccard_score

from models.metrics.segmentation import intersections_and_unions, mean_iou


def test_mean_iou_equals_scikit_learn():
    g = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(0, 4, (3, 20, 30), generator=g) for _ in range(2))
    labels[torch.rand(labels.shape, generator=g) < 0.1] = 255
    counts = sum(intersections_and_unions(p, label, classes=5) for p, label in zip(predicted, labels, strict=True))
    mean, per_class = mean_iou(counts)
    valid = labels != 255
    wanted = jaccard_score(labels[valid].numpy(), predicted[valid].numpy(), average=None, labels=range(4))
    torch.testing.assert_close(per_class[:4], 100 * torch.from_numpy(wanted))
    assert per_class[4].isnan() and mean == pytest.approx(100 * wanted.mean())


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match="5 classes"):
        intersections_and_unions(torch.zeros(2), torch.tensor([0, 7]), classes=5)
    assert intersections_and_unions(torch.zeros(2), torch.tensor([255, 255]), classes=2).tolist() == [[0, 0], [0, 0]]
