import pytest
import torch

from models.io import CheckpointError
from models.mm_lego.checkpoint import block_from_official, blocks_from_official, load_shared
from models.mm_lego.fuse import LegoFuse
from tests.golden.harness import DATA, load
from tests.golden.mm_lego import weights_of

CASE = load(DATA / "mm_lego" / "fuse.safetensors").case


def official_model():
    """The file of an official LegoFuse behind a stack, which has replaced the latents of all blocks but the first."""
    weights = {}
    for i in range(3):
        block = weights_of(CASE, f"block{i}")
        if i:
            block["latent"] = block["latent"].expand(7, -1, -1)
        weights |= {f"layers.{i}.{name}": value for name, value in block.items()}
        if i < 2:
            weights |= {f"to_logits.head{i + 1}.{n[10:]}": v for n, v in block.items() if n.startswith("to_logits.")}
    head = {f"to_logits.combined_layers.{n[10:]}": v + 1 for n, v in block.items() if n.startswith("to_logits.")}
    return weights | head | {"L": CASE.weights["fuse.L"]}


def test_a_fused_model_is_read_block_by_block():
    weights = official_model()
    blocks = blocks_from_official(weights)
    assert [block.steps[0].cross_attention.norm_context.weight.numel() for block in blocks] == [9, 6, 5]
    assert torch.equal(blocks[0].latent, weights["layers.0.latent"])
    assert blocks[1].latent.shape == blocks[0].latent.shape
    model = LegoFuse(blocks, "weave")
    load_shared(model, weights)
    assert torch.equal(model.latent, weights["L"])
    assert torch.equal(model.head.linear.bias, weights["to_logits.combined_layers.2.bias"])


def test_weights_that_are_none_of_a_block_are_refused():
    weights = weights_of(CASE, "block0")
    with pytest.raises(CheckpointError, match="with encoder"):
        block_from_official(weights, torch.nn.Identity())
    del weights["layers.0.1.norm.weight"]
    with pytest.raises(CheckpointError, match="modality_feed_forward.norm.weight"):
        block_from_official(weights)


def test_steps_that_differ_are_not_shared():
    weights = weights_of(CASE, "block0")
    for i in (1, 2):
        weights |= {n.replace("layers.0", f"layers.{i}"): v + i for n, v in weights.items() if n.startswith("layers.0.")}
    with pytest.raises(CheckpointError, match="share=after_first"):
        block_from_official(weights, share="after_first")
    weights |= {n.replace("layers.1", "layers.2"): v for n, v in weights.items() if n.startswith("layers.1.")}
    assert len(block_from_official(weights, share="after_first").steps) == 2
