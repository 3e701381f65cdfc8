"""Kernels against the plain passes that define them: in Triton's interpreter, and on a GPU where there is one.

Triton decides on its interpreter when it is imported, so that those tests run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.losses import contrastive as plain
from models.losses.contrastive import InfoNCELoss, SigmoidLoss, info_nce, sigmoid_terms
from models.rad_dino.losses import cross_entropy_pass, prototype_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS = INTERPRETED or torch.cuda.is_available()
here = pytest.mark.skipif(not RUNS, reason="needs a GPU or Triton's interpreter")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
SHAPES = [(1, 1), (7, 5), (33, 257), (64, 512), (45, 300)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_triton
@pytest.mark.skipif(RUNS, reason="the tests of this file run here")
def test_the_interpreter_agrees():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0].count(".") > 50  # they ran and were not skipped


def logits(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    return (8 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def kernels():
    from models.losses import kernels

    return kernels


tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [-10.0, 0.5])
def test_sigmoid_pass(shape, dtype, bias):
    x, bias = logits(shape, dtype), torch.tensor([bias], device=DEVICE)
    first = max(0, shape[1] - shape[0]) // 2
    ours, wanted = x.clone(), x.clone()
    sums = kernels().sigmoid_pass(ours, bias, first, True)
    torch.testing.assert_close(sums, plain.sigmoid_pass(wanted, bias, first, True), rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(ours, wanted, rtol=tolerance[dtype], atol=1e-7)
    untouched = x.clone()
    torch.testing.assert_close(kernels().sigmoid_pass(untouched, bias, first, False), sums)
    assert torch.equal(untouched, x)


@here
@pytest.mark.gpu
def test_small_terms_are_not_lost():
    """log(1 + exp(x)) of logits so low that 1 + exp(x) is 1 in float32."""
    x = torch.full((40, 300), -20.0, device=DEVICE)
    total = kernels().sigmoid_pass(x, torch.zeros(1, device=DEVICE), 10**6, False)[0]
    assert float(total) == pytest.approx(12000 * 2.061153618e-9, rel=1e-5)


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalisers_and_softmaxes(shape, dtype):
    x = logits(shape, dtype)
    first = max(0, shape[1] - shape[0]) // 2
    ours, wanted = kernels().normalisers_pass(x), plain.normalisers_pass(x)
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)
    out, expected = torch.empty_like(x), torch.empty_like(x)
    plain.softmaxes_pass(x, *wanted, first, expected)
    kernels().softmaxes_pass(x, *wanted, first, out)
    torch.testing.assert_close(out, expected, rtol=tolerance[dtype], atol=2e-6)
    in_place = x.clone()
    kernels().softmaxes_pass(in_place, *wanted, first, in_place)
    assert torch.equal(in_place, out)


@here
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 2500)])
@pytest.mark.parametrize("shared", [False, True])
def test_cross_entropy_pass(shape, dtype, shared):
    generator = torch.Generator().manual_seed(2)
    targets, weights = torch.rand(shape, generator=generator).to(DEVICE), torch.rand(shape[0], generator=generator).to(DEVICE)
    target_of = torch.randint(shape[0], shape[:1], generator=generator).to(DEVICE) if shared else None
    x = logits(shape, dtype)
    ours = kernels().cross_entropy_pass(x.clone(), targets, target_of, weights, 0.1)
    wanted = cross_entropy_pass(x.clone(), targets, target_of, weights, 0.1)
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours[1], wanted[1], rtol=tolerance[dtype], atol=2e-4)


def leaves():
    generator = torch.Generator().manual_seed(1)
    sides = [torch.randn(45, 24, generator=generator).to(DEVICE).requires_grad_() for _ in range(3)]
    return *sides, *(torch.tensor([value], device=DEVICE, requires_grad=True) for value in (20.0, -8.0))


@here
@pytest.mark.gpu
@pytest.mark.parametrize("tile_entries", [45 * 10, None])
@pytest.mark.parametrize("loss", ["sigmoid", "info_nce"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_losses_and_gradients(loss, tile_entries, precision):
    image, text, extra, scale, bias = leaves()
    inputs = [image, text, extra, scale, bias] if loss == "sigmoid" else [image, text, scale]
    results = []
    for fused in (True, False):
        with torch.autocast(DEVICE, dtype=precision, enabled=precision is not None):
            if loss == "sigmoid":
                value = sigmoid_terms(image, [text, extra], scale, bias, tile_entries=tile_entries, fused=fused).total
            else:
                value = info_nce(image, text, scale, tile_entries=tile_entries, kept_entries=45 * 20, fused=fused)
        gradients = torch.autograd.grad(3 * value, inputs, retain_graph=True)
        for first, again in zip(gradients, torch.autograd.grad(3 * value, inputs), strict=True):
            assert torch.equal(first, again)  # a tile that was kept is still what it was
        results.append([value.detach(), *gradients])
    for ours, wanted in zip(*results, strict=True):
        largest = float(wanted.abs().max())
        torch.testing.assert_close(ours, wanted, rtol=0, atol=(1e-5 if precision is None else 1e-2) * largest)


@here
@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_prototype_loss_and_gradients(precision, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    unit, weight = (torch.randn(n, 24, generator=generator).to(DEVICE).requires_grad_() for n in (9, 40))
    targets, weights = torch.rand(9, 40, generator=generator).to(DEVICE), torch.rand(9, generator=generator).to(DEVICE)
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("models.rad_dino.losses.kernels_for", lambda x: None)
        with torch.autocast(DEVICE, dtype=precision, enabled=precision is not None):
            value = prototype_loss(unit, weight, targets, weights)
        results.append([value.detach(), *torch.autograd.grad(3 * value, [unit, weight])])
    for ours, expected in zip(*results, strict=True):
        largest = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=(1e-5 if precision is None else 1e-2) * largest)


@here
@pytest.mark.gpu
@pytest.mark.parametrize("loss", [SigmoidLoss, InfoNCELoss])
def test_the_modules_take_the_kernels_unless_they_are_told_otherwise(loss, monkeypatch):
    calls = []
    for name in ("sigmoid_pass", "normalisers_pass"):
        function = getattr(kernels(), name)
        monkeypatch.setattr(kernels(), name, lambda *args, function=function: calls.append(1) or function(*args))
    image, text, extra, scale, bias = leaves()
    loss(fused=False)(image, [text, extra], scale, bias)
    loss()(image.double(), [text.double(), extra.double()], scale.double(), bias.double())
    assert not calls
    loss()(image, [text, extra], scale, bias)
    assert calls
