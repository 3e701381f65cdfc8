import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, top_k_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from models.metrics.classification import (
    balanced_accuracy,
    class_vectors,
    confusion_matrix,
    macro_f1,
    top_k_accuracy,
    zero_shot_logits,
)


def sample(seed=0, rows=200, classes=7):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return torch.randn(rows, classes, generator=generator) + 2 * torch.eye(classes)[labels], labels


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_equals_scikit_learn(k):
    logits, labels = sample()
    wanted = top_k_accuracy_score(labels.numpy(), logits.numpy(), k=k, labels=range(7)) * 100
    assert top_k_accuracy(logits, labels, k) == pytest.approx(wanted)


def test_top_k_ties_rank_by_class_index_and_nan_never_wins():
    assert top_k_accuracy(torch.zeros(4, 4), torch.tensor([0, 1, 2, 3]), 2) == 50.0
    assert top_k_accuracy(torch.full((4, 4), float("nan")), torch.tensor([0, 1, 2, 3]), 1) == 0.0


def test_balanced_accuracy_and_confusion_equal_scikit_learn():
    logits, labels = sample()
    predicted = logits.argmax(dim=1)
    wanted = balanced_accuracy_score(labels.numpy(), predicted.numpy()) * 100
    assert balanced_accuracy(predicted, labels, 7) == pytest.approx(wanted)
    wanted = sklearn_confusion_matrix(labels.numpy(), predicted.numpy(), labels=range(7))
    assert confusion_matrix(predicted, labels, 7).tolist() == wanted.tolist()


def test_macro_f1_equals_scikit_learn():
    torch.manual_seed(4)
    labels, predicted = (
        torch.randint(0, 6, (200,)),
        torch.randint(1, 8, (200,)),
    )  # 0 is never predicted, 6 and 7 never right, 8 absent
    assert macro_f1(predicted, labels, 9) == pytest.approx(100 * f1_score(labels, predicted, average="macro"))


def test_balanced_accuracy_leaves_out_classes_that_do_not_occur():
    assert balanced_accuracy(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 2, 2]), 3) == 75.0


def test_class_vectors_normalise_average_normalise():
    prompts = torch.tensor([[[3.0, 0.0], [0.0, 0.5]]])
    torch.testing.assert_close(class_vectors(prompts), torch.full((2, 1), 0.5**0.5))
    logits = zero_shot_logits(torch.tensor([[0.0, 9.0]]), class_vectors(prompts))
    torch.testing.assert_close(logits, torch.tensor([[100 * 0.5**0.5]]))
