import pytest
import torch
import torch.nn.functional as F

from models.batch import IGNORE_INDEX
from models.hammer.grounding import token_grounding


def test_mixes_labels_and_teacher_over_real_tokens_only():
    torch.manual_seed(0)
    logits, teacher = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    labels = torch.randint(0, 2, (3, 4))
    labels[1, 2:] = IGNORE_INDEX
    kept = labels != IGNORE_INDEX
    ce = F.cross_entropy(logits[kept], labels[kept])
    kd = F.cross_entropy(logits[kept], teacher[kept].softmax(-1))
    torch.testing.assert_close(token_grounding(logits, labels, teacher, 0.3), 0.7 * ce + 0.3 * kd)
    torch.testing.assert_close(token_grounding(logits, labels), ce)


@pytest.mark.parametrize("place", ["logits", "teacher"])
def test_padding_does_not_matter(place):
    logits, teacher, labels = torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.tensor([[1, IGNORE_INDEX]])
    before = token_grounding(logits, labels, teacher, 0.5)
    {"logits": logits, "teacher": teacher}[place][0, 1] = torch.tensor([50.0, -50.0])
    assert token_grounding(logits, labels, teacher, 0.5) == before
