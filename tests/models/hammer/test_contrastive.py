import pytest
import torch
import torch.nn.functional as F

from experiments.benchmarks.reference.hammer import contrastive_terms, similarities
from models.hammer.contrastive import manipulation_contrastive

BATCH, WIDTH, QUEUE = 5, 6, 23


def inputs(temperature: float):
    torch.manual_seed(3)
    features = [F.normalize(torch.randn(BATCH, WIDTH), dim=1) for _ in range(4)]
    queues = [F.normalize(torch.randn(WIDTH, QUEUE), dim=0) for _ in range(2)]
    leaves = [feature.requires_grad_() for feature in features[:2]] + [torch.tensor(temperature, requires_grad=True)]
    return [*features, *queues, leaves[2], torch.tensor([True, False, True, True, False])], leaves


@pytest.mark.parametrize("tile", [1, 7, 64])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [0.07, 0.001, 0.5])
def test_equals_the_plain_form(tile, alpha, temperature):
    arguments, leaves = inputs(temperature)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.3])
    plain = torch.stack(contrastive_terms(similarities(*arguments, alpha)))
    expected = torch.autograd.grad((plain * weights).sum(), leaves)
    ours = torch.stack(tuple(manipulation_contrastive(*arguments, alpha, tile=tile)))
    found = torch.autograd.grad((ours * weights).sum(), leaves)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_momentum_and_queues_get_no_gradient():
    arguments, _ = inputs(0.07)
    others = [argument.requires_grad_() for argument in arguments[2:6]]
    terms = manipulation_contrastive(*arguments, 0.4)
    found = torch.autograd.grad(terms.mean, others, allow_unused=True)
    assert found == (None,) * 4


def test_a_manipulated_pair_is_no_positive():
    arguments, _ = inputs(0.07)
    real = torch.zeros(BATCH, dtype=torch.bool)
    terms = manipulation_contrastive(*arguments[:-1], real, 0.0)
    assert terms.i2t == 0 and terms.t2i == 0
    assert terms.i2i > 0 and terms.t2t > 0
