import cmath
import math
from functools import partial

import pytest
import torch

from models.errors import UserError
from models.mm_lego.fuse import LegoFuse
from models.mm_lego.heads import METHODS, merge_heads, slerp
from models.mm_lego.merge import LegoMerge, merge_latents, ties
from tests.models.mm_lego.stand_in import small_block, small_blocks, small_inputs

MODELS = {
    **{method: partial(LegoMerge, method=method) for method in ("sum", "mean", "product", "harmonic", "ties")},
    **{method: partial(LegoFuse, method=method) for method in ("stack", "weave")},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_modality_is_as_if_its_block_were_not_there(name):
    blocks, inputs = small_blocks(3), small_inputs(3, batch_size=4)
    model = MODELS[name](blocks)
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 1, 0]]).bool()
    inputs[2] = torch.where(present[:, 2, None, None], inputs[2], 1e3)
    latent = model.encode(inputs, present)
    for row, pattern in enumerate(present):
        some = [i for i in range(3) if pattern[i]]
        if len(some) > 1:
            alone = MODELS[name]([blocks[i] for i in some])
            if name == "weave":
                alone.latent.data.copy_(model.latent)
            expected = alone.encode([inputs[i][row : row + 1] for i in some])
            torch.testing.assert_close(latent[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    logits = model(inputs, present)
    torch.testing.assert_close(logits[3], blocks[1].head(latent)[3])
    torch.testing.assert_close(logits[:3], model.head(latent)[:3])


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"weave"}))
def test_one_modality_alone_gives_its_block(name):
    blocks, inputs = small_blocks(2), small_inputs(2)
    if name == "ties":
        model = LegoMerge(blocks, "ties", density=1.0)
    else:
        model = MODELS[name](blocks)
    only = torch.tensor([[False, True]]).expand(3, 2)
    torch.testing.assert_close(model(inputs, only), blocks[1](inputs[1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sample 1"):
        model(inputs, torch.tensor([[True, True], [False, False], [True, True]]))


@pytest.mark.parametrize("weights", [None, (0.2, 0.3, 0.5)])
def test_harmonic_mean_of_three(weights):
    torch.manual_seed(0)
    latents = torch.randn(3, 2, 2, 2, dtype=torch.complex64)
    result = merge_latents(latents, "harmonic", weights)
    shares = weights or (1 / 3,) * 3
    for i in range(2):
        values = [complex(z) for z in latents[:, i, 1, 0]]
        length = 1 / sum(w / abs(z) for w, z in zip(shares, values, strict=True))
        angle = cmath.phase(sum(w * z for w, z in zip(shares, values, strict=True)))
        assert complex(result[i, 1, 0]) == pytest.approx(cmath.rect(length, angle), rel=1e-4)


def test_phases_near_pi_average_to_pi_unless_officially():
    latents = torch.polar(torch.ones(2), torch.tensor([3.0, -3.0]))[:, None, None, None]
    assert abs(float(merge_latents(latents, "harmonic").angle())) == pytest.approx(math.pi, abs=1e-5)
    assert float(merge_latents(latents, "harmonic", phase="arithmetic").angle()) == pytest.approx(0, abs=1e-6)
    halved = merge_latents(latents, "harmonic", official_constant=True)
    torch.testing.assert_close(halved, merge_latents(latents, "harmonic") / 2)


def test_ties_elects_the_sign_of_the_larger_sum():
    latents = torch.tensor([[3.0, -1.0, 0.1], [-1.0, -3.0, 0.2], [2.0, 2.0, 0.1]])[:, None, None]
    torch.testing.assert_close(ties(latents, 1.0).flatten(), torch.tensor([2.5, -2.0, 0.4 / 3]))
    torch.testing.assert_close(ties(latents, 2 / 3).flatten(), torch.tensor([2.5, -2.0, 0.0]))


def test_slerp_is_an_arc():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, 0.5), torch.tensor([3.0, 3.0]) / math.sqrt(2))
    for pair in ((a, 2 * a), (a, -a), (a, 0 * a), (0 * a, 0 * a)):
        torch.testing.assert_close(slerp(*pair, 0.25), 0.75 * pair[0] + 0.25 * pair[1])


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_has_all_the_weight_is_the_result(method):
    heads = [block.head for block in small_blocks(3)]
    merged = merge_heads(heads, method, (1, 0, 0))
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, heads[0].state_dict()[name])


def test_heads_of_untrained_blocks_merge_to_numbers():
    torch.manual_seed(0)
    blocks = [small_block(width) for width in (9, 6)]
    assert LegoMerge(blocks)(small_inputs()).isfinite().all()
    assert LegoMerge(blocks, head_method="slerp_official")(small_inputs()).isnan().all()


def test_only_officially_the_third_head_is_left_out():
    blocks = small_blocks(3)
    before = [LegoMerge(blocks, heads_of=kind).head.linear.weight.clone() for kind in ("all", "first_two")]
    blocks[2].head.linear.weight.data.add_(1)
    after = [LegoMerge(blocks, heads_of=kind).head.linear.weight for kind in ("all", "first_two")]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_merging_leaves_blocks_and_inputs_as_they_were():
    blocks, inputs = small_blocks(2), small_inputs()
    before = [value.clone() for block in blocks for value in block.state_dict().values()]
    for model in (make(blocks) for make in MODELS.values()):
        model(inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, small_inputs(), strict=True))
    after = [value for block in blocks for value in block.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_weights_must_be_shares():
    with pytest.raises(UserError, match="2 shares"):
        LegoMerge(small_blocks(2), weights=(0.8, 0.8))
    with pytest.raises(UserError, match="equal latent shape"):
        LegoMerge([small_block(), small_block(latent_dim=4)])


def test_every_parameter_of_a_stack_but_unused_ones_is_trained():
    model = LegoFuse(small_blocks(2), "stack")
    model(small_inputs()).square().sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(".head." in name for name in unused)
