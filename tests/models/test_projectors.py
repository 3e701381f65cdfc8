import pytest
import torch
import torch.nn.functional as F

from models.projectors import GatedProjector, LinearProjector, MLPProjector


@pytest.mark.parametrize("projector", [LinearProjector, MLPProjector, GatedProjector])
def test_shapes_and_initial_weights(projector):
    torch.manual_seed(0)
    module = projector(6, 5)
    assert module(torch.randn(2, 3, 6)).shape == (2, 3, 5)
    assert all(bool((p == 0).all()) for name, p in module.named_parameters() if name.endswith("bias"))


def gated_plain(module: GatedProjector, x: torch.Tensor) -> torch.Tensor:
    """The formula with two matrices, clamps on both branches and torch's own ReLU6."""
    (w1, w2), (b1, b2) = module.gate_and_value.weight.chunk(2), module.gate_and_value.bias.chunk(2)
    gate = F.relu6(F.linear(x, w1, b1).clamp(-module.clamp, module.clamp))
    return module.down(gate * F.linear(x, w2, b2).clamp(-module.clamp, module.clamp))


@pytest.mark.parametrize("clamp", [1e3, 8.0, 2.0])
def test_gated_projector_is_the_formula_with_gradients(clamp):
    """Inputs reach the knees of ReLU6 and both clamps."""
    torch.manual_seed(0)
    module = GatedProjector(6, 5, width_factor=3, clamp=clamp).double()
    x = (torch.randn(7, 6, dtype=torch.float64) * clamp * 2).requires_grad_()
    wanted, got = gated_plain(module, x), module(x)
    torch.testing.assert_close(got, wanted)
    (a,) = torch.autograd.grad(got.square().sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(a, b)


def test_fused_halves_have_the_spread_of_separate_matrices():
    torch.manual_seed(0)
    weight = GatedProjector(64, 8, width_factor=4).gate_and_value.weight
    bound = (6 / (64 + 256)) ** 0.5
    for half in weight.chunk(2):
        assert 0.98 * bound < half.abs().max() <= bound


def test_mlp_uses_the_exact_gelu():
    module = MLPProjector(4, 3, hidden_factor=2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    hidden = module.up(x)
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(module(x), module.down(gelu))
