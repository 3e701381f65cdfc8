import pytest
import torch
from sklearn.metrics import jaccard_score

from models.metrics.classification import confusion_matrix, mean_iou


def test_mean_iou_equals_scikit_learn():
    g = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(0, 4, (3, 20, 30), generator=g) for _ in range(2))
    labels[torch.rand(labels.shape, generator=g) < 0.1] = 255
    counts = sum(confusion_matrix(p, label, 5, ignore=255) for p, label in zip(predicted, labels, strict=True))
    mean, per_class = mean_iou(counts)
    valid = labels != 255
    wanted = jaccard_score(labels[valid].numpy(), predicted[valid].numpy(), average=None, labels=range(4))
    torch.testing.assert_close(per_class[:4], 100 * torch.from_numpy(wanted))
    assert per_class[4].isnan() and mean == pytest.approx(100 * wanted.mean())


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match="5 classes"):
        confusion_matrix(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 7]), 5)
    nothing = confusion_matrix(torch.zeros(2, dtype=torch.int64), torch.tensor([255, 255]), 2, ignore=255)
    assert nothing.tolist() == [[0, 0], [0, 0]]
