import pytest
import torch
from torch import nn

from experiments.benchmarks.reference.mm_lego import encode as official_order
from models.mm_lego import layers
from models.mm_lego.encoders import SNN, GatedAttentionPooling
from models.mm_lego.layers import FeedForward, GatedLayer
from models.mm_lego.spectrum import fold, half_spectrum, multiplicity, real_spectrum
from tests.models.mm_lego.stand_in import small_block


def with_round_trips(block, x):
    """The forward pass as the paper states it: transform back behind each step, normalise and transform again."""
    latent, dim = block.latent.expand(len(x), -1, -1), block.fourier_dim
    for i in range(block.depth):
        step = block.steps[min(i, len(block.steps) - 1)]
        if block.normalise:
            latent = latent / latent.norm(dim=dim, keepdim=True)
        spectrum = torch.fft.fft(latent, dim=dim)
        seen = torch.fft.fft(step.read(x, attend=block.modality_attention == "applied"), dim=dim).real
        out = step.cross_attention(spectrum.real, seen) + spectrum.real
        out = step.feed_forward(out) + out
        latent_spectrum = torch.complex(out, spectrum.imag)
        latent = torch.fft.ifft(latent_spectrum if block.track_imaginary else out, dim=dim)
    return latent_spectrum


@pytest.mark.parametrize("fourier_dim", [1, 2])
@pytest.mark.parametrize("track_imaginary", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_staying_in_the_frequency_domain_is_exact(fourier_dim, track_imaginary, normalise):
    torch.manual_seed(0)
    options = {"fourier_dim": fourier_dim, "track_imaginary": track_imaginary, "normalise": normalise}
    block = small_block(depth=3, modality_attention="applied", **options).double()
    x = torch.randn(3, 4, 6)
    block.float()
    torch.testing.assert_close(block.encode(x), with_round_trips(block, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_half_of_the_spectrum_is_enough(length):
    x = torch.randn(3, 4, length)
    torch.testing.assert_close(real_spectrum(x), torch.fft.fft(x).real)
    rows = torch.randn(3, length, 4, requires_grad=True)
    half, expected = half_spectrum(fold(rows), length), torch.fft.fft(rows, dim=1).real[:, : length // 2 + 1]
    torch.testing.assert_close(half, expected)
    weights = torch.randn_like(half)
    gradients = (torch.autograd.grad((out * weights).sum(), rows)[0] for out in (half, expected))
    torch.testing.assert_close(*gradients)
    assert multiplicity(length, rows.device).sum() == length


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_folded_feed_forward_is_the_fold_of_the_feed_forward(needs_gradient):
    layer = FeedForward(6)
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.norm.bias)
    x = torch.randn(3, 5, 6, requires_grad=needs_gradient)
    outs = layer.folded(x), fold(layer.reduce(GatedLayer.apply(layer.norm(x), layer.expand.weight, layer.expand.bias)))
    torch.testing.assert_close(*outs)
    weights = torch.randn_like(outs[0])
    gradients = (torch.autograd.grad((out * weights).sum(), [*layer.parameters()]) for out in outs)
    torch.testing.assert_close(*gradients)


def test_sharing_counts_the_steps():
    assert [len(small_block(depth=4, share=share).steps) for share in ("none", "after_first", "all")] == [4, 2, 1]


def test_shared_steps_read_the_modality_once(monkeypatch):
    block, x, calls = small_block(depth=3, share="all"), torch.randn(2, 4, 6), []
    monkeypatch.setattr(block.steps[0], "memory", lambda *a: calls.append(a) or type(block.steps[0]).memory(block.steps[0], *a))
    torch.testing.assert_close(block.encode(x), with_round_trips(block, x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_unused_attention_has_no_effect_and_applied_attention_does():
    torch.manual_seed(0)
    x, blocks = torch.randn(2, 4, 6), {}
    for kind in ("unused", "applied"):
        blocks[kind] = small_block(modality_attention=kind)
        blocks[kind].load_state_dict(blocks["unused"].state_dict())
    plain = small_block()
    plain.load_state_dict(blocks["unused"].state_dict(), strict=False)
    assert torch.equal(plain(x), blocks["unused"](x))
    assert not torch.allclose(blocks["applied"](x), blocks["unused"](x))
    blocks["unused"](x).sum().backward()
    assert all(p.grad is None for p in blocks["unused"].steps[0].modality_attention.parameters())


def test_a_column_of_zeros_stays_finite():
    block = small_block()
    block.latent.data[:, 0] = 0
    block(torch.randn(2, 4, 6)).sum().backward()
    assert block.latent.grad.isfinite().all()


@pytest.mark.parametrize(
    "encoder, x, width",
    [
        (SNN(7, (12, 10)), torch.randn(3, 7), 10),
        (GatedAttentionPooling(7, 12, 6, 10), torch.randn(3, 5, 7), 10),
        (nn.Conv1d(7, 10, 1), torch.randn(3, 7, 5), 5),
    ],
    ids=["table", "bag", "tokens"],
)
def test_any_encoder_is_trained_through(encoder, x, width):
    block = small_block(width, encoder=encoder)
    assert block(x).shape == (3, 4)
    block(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_a_bag_does_not_depend_on_its_neighbours_unless_officially():
    bags = torch.randn(3, 5, 7)
    for kind, depends in (("patches", False), ("batch", True)):
        pool = GatedAttentionPooling(7, 12, 6, 10, softmax_over=kind).eval()
        assert torch.allclose(pool(bags)[:1], pool(bags[:1]), atol=1e-6) is not depends


@pytest.mark.parametrize("rows", [4, 512])
def test_the_gated_layer_has_the_gradients_of_its_equation(rows, monkeypatch):
    monkeypatch.setattr(layers, "hidden_rows", lambda *_: rows)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (8, 4), (8,))]
    a, g = nn.functional.linear(*inputs).chunk(2, dim=-1)
    torch.testing.assert_close(GatedLayer.apply(*inputs), a * nn.functional.selu(g))
    assert torch.autograd.gradcheck(GatedLayer.apply, inputs)


def test_the_order_of_the_benchmark_computes_the_same():
    block = small_block(modality_attention="unused")
    for length in (1, 2, 4, 7):
        x = torch.randn(2, length, 6)
        torch.testing.assert_close(block.encode(x), official_order(block, x), rtol=1e-4, atol=1e-4)
