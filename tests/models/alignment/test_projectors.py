import pytest
import torch
import torch.nn.functional as F

from models.alignment import projectors
from models.alignment.projectors import GatedProjector, LinearProjector, MLPProjector


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
    inputs = [x, *module.parameters()]
    grads = zip(
        torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(wanted.square().sum(), inputs), strict=True
    )
    for ours, plain in grads:
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("chunk", [2, 100])
def test_gradients_of_a_norm_before_frozen_features(chunk, monkeypatch):
    """They are made without the gradient towards the features, and must be autograd's all the same."""
    monkeypatch.setattr(projectors, "hidden_rows", lambda *_: chunk)
    torch.manual_seed(0)
    module, norm = GatedProjector(6, 5, width_factor=3, clamp=8.0).double(), torch.nn.LayerNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    torch.nn.init.normal_(module.gate_and_value.bias)
    x, target = torch.randn(3, 3, 6, dtype=torch.float64) * 4, torch.randn(3, 3, 5, dtype=torch.float64)
    inputs = [*norm.parameters(), *module.parameters()]
    got, wanted = module.after_norm(x, norm), gated_plain(module, norm(x))
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(module.after_norm(x, norm), wanted)
    grads = zip(torch.autograd.grad(got, inputs, target), torch.autograd.grad(wanted, inputs, target), strict=True)
    for ours, plain in grads:
        torch.testing.assert_close(ours, plain)
    x.requires_grad_()
    (ours,), (plain,) = (
        torch.autograd.grad(f(x), x, target)
        for f in (lambda x: module.after_norm(x, norm), lambda x: gated_plain(module, norm(x)))
    )
    torch.testing.assert_close(ours, plain)


def test_gated_projector_follows_autocast():
    """Its error in bfloat16 is that of torch's own autocast."""
    torch.manual_seed(0)
    module, norm, x = GatedProjector(16, 8), torch.nn.LayerNorm(16), torch.randn(9, 16)
    inputs = [*norm.parameters(), *module.parameters()]
    exact = torch.autograd.grad(gated_plain(module, norm(x)).sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, plain = module.after_norm(x, norm), gated_plain(module, norm(x))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, plain, rtol=2e-2, atol=2e-2)
    grads = (torch.autograd.grad(out.float().sum(), inputs) for out in (got, plain))
    for ours, autocast, wanted in zip(*grads, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - wanted).norm() <= 1.2 * (autocast - wanted).norm()


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
