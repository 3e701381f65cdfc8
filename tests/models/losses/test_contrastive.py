import pytest
import torch

from experiments.benchmarks.reference import contrastive as reference
from models.losses.contrastive import InfoNCELoss, SigmoidLoss, info_nce, sigmoid_terms

SIZE, DIM = 7, 5


def leaves(*names, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    out = {name: torch.randn(SIZE, DIM, generator=generator, dtype=dtype).requires_grad_() for name in names}
    out["scale"] = torch.tensor([6.0], dtype=dtype, requires_grad=True)
    out["bias"] = torch.tensor([-2.5], dtype=dtype, requires_grad=True)
    return out


def assert_same_with_gradients(loss, wanted, inputs):
    torch.testing.assert_close(loss, wanted)
    # A factor before the backward pass, so that an ignored incoming gradient shows.
    for got, want in zip(
        torch.autograd.grad(3 * loss, inputs, retain_graph=True), torch.autograd.grad(3 * wanted, inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["pairs", "batch"])
@pytest.mark.parametrize("texts", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_sigmoid_loss(reduction, texts):
    x = leaves("image", *texts)
    out = SigmoidLoss(reduction)(x["image"], [x[name] for name in texts], x["scale"], x["bias"])
    wanted = reference.sigmoid_loss(x["image"], [x[name] for name in texts], x["scale"], x["bias"], reduction)
    assert_same_with_gradients(out.losses["contrastive"], wanted, list(x.values()))
    assert set(out.losses) == {"contrastive"} and not any(value.requires_grad for value in out.report.values())
    first = reference.sigmoid_loss(x["image"], [x["a"]], x["scale"], x["bias"], reduction)
    torch.testing.assert_close(out.report["positive_loss"] + out.report["negative_loss"], first.detach())
    if len(texts) > 1:
        extra = reference.sigmoid_loss(x["image"], [x[name] for name in texts[1:]], x["scale"], x["bias"], reduction)
        torch.testing.assert_close(out.report["extra_loss"], extra.detach())


@pytest.mark.parametrize("tile_entries", [1, 3 * SIZE, 10**6])
def test_any_tile_gives_the_same(tile_entries):
    x = leaves("image", "text")
    inputs = list(x.values())
    total = sigmoid_terms(inputs[0], inputs[1:2], *inputs[2:], tile_entries=tile_entries).total
    wanted = reference.sigmoid_loss(x["image"], [x["text"]], x["scale"], x["bias"]) * SIZE**2
    assert_same_with_gradients(total, wanted, inputs)
    loss = info_nce(x["image"], x["text"], x["scale"], tile_entries=tile_entries, kept_entries=3 * SIZE)
    assert_same_with_gradients(loss, reference.info_nce(x["image"], x["text"], x["scale"]), inputs[:3])


def test_report_parts():
    x = leaves("image", "text")
    terms = sigmoid_terms(x["image"], [x["text"]], x["scale"], x["bias"])
    cosines = torch.nn.functional.normalize(x["image"], dim=-1) @ torch.nn.functional.normalize(x["text"], dim=-1).T
    logits = x["scale"] * cosines + x["bias"]
    torch.testing.assert_close(terms.positive[0], -torch.nn.functional.logsigmoid(logits.diagonal()).sum())


def test_gradients_pass_gradcheck():
    x = leaves("image", "text")
    assert torch.autograd.gradcheck(
        lambda i, t, s, b: sigmoid_terms(i, [t, 2 * t + i], s, b, tile_entries=3 * SIZE).total, list(x.values())
    )
    inputs = list(x.values())[:3]
    assert torch.autograd.gradcheck(lambda *inputs: info_nce(*inputs, tile_entries=3 * SIZE), inputs)


def test_extreme_logits_stay_finite():
    x = leaves("image", "text", dtype=torch.float32)
    loss = sigmoid_terms(x["image"], [x["text"]], x["scale"] * 1e3, x["bias"]).total + info_nce(
        x["image"], x["text"], x["scale"] * 1e3
    )
    loss.backward()
    assert loss.isfinite() and all(leaf.grad.isfinite().all() for leaf in x.values())


def test_autocast_lowers_the_products_and_nothing_else():
    x = leaves("image", "text", dtype=torch.float32)
    exact = sigmoid_terms(x["image"], [x["text"]], x["scale"], x["bias"]).total + info_nce(x["image"], x["text"], x["scale"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = sigmoid_terms(x["image"], [x["text"]], x["scale"], x["bias"]).total + info_nce(x["image"], x["text"], x["scale"])
    assert low.dtype == torch.float32 and low != exact
    torch.testing.assert_close(low, exact, rtol=2e-2, atol=0)
    wanted = torch.autograd.grad(exact, x["image"])[0]
    torch.testing.assert_close(torch.autograd.grad(low, x["image"])[0], wanted, rtol=0, atol=0.03 * float(wanted.abs().max()))


def test_info_nce_module_ignores_extra_texts_and_bias():
    x = leaves("image", "text", "extra")
    loss = InfoNCELoss()(x["image"], [x["text"], x["extra"]], x["scale"], x["bias"]).losses["contrastive"]
    torch.testing.assert_close(loss, reference.info_nce(x["image"], x["text"], x["scale"]))


@pytest.mark.parametrize("loss", [SigmoidLoss(), InfoNCELoss()])
def test_float32_equals_the_dense_form_and_its_gradients(loss):
    generator = torch.Generator().manual_seed(1)
    image, text, extra = (torch.randn(96, 24, generator=generator).requires_grad_() for _ in range(3))
    scale, bias = torch.tensor([50.0], requires_grad=True), torch.tensor([-8.0], requires_grad=True)
    ours = loss(image, [text, extra], scale, bias).losses["contrastive"]
    if isinstance(loss, SigmoidLoss):
        dense, inputs = reference.sigmoid_loss(image, [text, extra], scale, bias), [image, text, extra, scale, bias]
    else:
        dense, inputs = reference.info_nce(image, text, scale), [image, text, scale]
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=0)
    grads = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(dense, inputs), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_backward_can_be_repeated_and_frozen_inputs_get_nothing():
    x = leaves("image", "text")
    x["image"].requires_grad_(False)
    for loss in (SigmoidLoss(), InfoNCELoss()):
        inputs = [x["text"], x["scale"]]
        value = loss(x["image"], [x["text"]], x["scale"], x["bias"]).losses["contrastive"]
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        for got, want in zip(torch.autograd.grad(value, inputs), first, strict=True):
            torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert not SigmoidLoss()(x["image"], [x["text"]], x["scale"], x["bias"]).losses["contrastive"].requires_grad
