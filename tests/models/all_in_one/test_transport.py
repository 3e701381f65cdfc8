"""Word-patch alignment against the exact solver's limit and against padding."""

import numpy as np
import torch
from scipy.optimize import linprog

from models.all_in_one.transport import word_patch_transport


def test_many_iterations_reach_the_optimal_plan():
    torch.manual_seed(0)
    text, visual = torch.randn(1, 4, 8), torch.randn(1, 6, 8)
    valid = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)
    found = word_patch_transport(text, visual, *valid, iterations=2000)
    rows = np.kron(np.eye(4), np.ones(6)), np.kron(np.ones(4), np.eye(6))
    limits = np.concatenate([np.full(4, 1 / 4), np.full(6, 1 / 6)])
    exact = linprog(found.cost[0].double().numpy().ravel(), A_eq=np.concatenate(rows), b_eq=limits).fun
    assert abs(found.distance.item() - exact) < 2e-3
    torch.testing.assert_close(found.plan.sum(dim=2), torch.full((1, 6), 1 / 6), rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    text, visual = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    text_valid = torch.arange(5)[None] < torch.tensor([[3], [5]])
    visual_valid = torch.arange(7)[None] < torch.tensor([[4], [7]])
    together = word_patch_transport(text, visual, text_valid, visual_valid).distance
    alone = word_patch_transport(text[:1, :3], visual[:1, :4], text_valid[:1, :3], visual_valid[:1, :4]).distance
    torch.testing.assert_close(together[:1], alone)


def test_gradient_goes_through_the_cost_alone():
    text = torch.randn(1, 3, 8, requires_grad=True)
    valid = torch.ones(1, 3, dtype=torch.bool)
    found = word_patch_transport(text, torch.randn(1, 3, 8), valid, valid)
    assert not found.plan.requires_grad
    (gradient,) = torch.autograd.grad(found.distance.sum(), text)
    assert gradient.abs().max() > 0


def test_a_text_without_words_costs_nothing():
    none = torch.zeros(1, 3, dtype=torch.bool)
    found = word_patch_transport(torch.randn(1, 3, 8), torch.randn(1, 4, 8), none, torch.ones(1, 4, dtype=torch.bool))
    assert found.distance.item() == 0
