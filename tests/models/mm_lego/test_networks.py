"""Blocks made for the modalities of data, and the networks that merged blocks are compared with."""

from functools import partial

import pytest
import torch
from torch import nn

from models.errors import UserError
from models.mm_lego.encoders import SNN, GatedAttentionPooling
from models.mm_lego.fuse import LegoFuse
from models.mm_lego.networks import Concatenation, LateFusion, OneModality, freeze_unused, make_blocks
from tests.models.mm_lego.stand_in import small_block, small_blocks, small_inputs


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 7)

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_blocks_read_every_kind_of_modality():
    shapes = {"table": (1, 9), "slides": (40, 6), "vitals": (5, 3), "scan": (3, 2, 2)}
    encoders = {"table": partial(SNN, widths=(8, 5)), "slides": partial(GatedAttentionPooling, output_dim=4), "image": Flat}
    blocks = make_blocks(shapes, 4, lambda width, num_classes, encoder=None: small_block(width, encoder=encoder), encoders)
    assert [block.width for block in blocks] == [5, 4, 3, 7] and blocks[2].encoder is None
    for block, shape in zip(blocks, shapes.values(), strict=True):
        assert block(torch.randn(2, *shape)).shape == (2, 4)
    with pytest.raises(UserError, match="is an image"):
        make_blocks({"scan": (3, 2, 2)}, 4, small_block)


def test_late_fusion_is_the_mean_of_the_blocks_a_patient_has():
    blocks, inputs = small_blocks(), small_inputs()
    present = torch.tensor([[True, True], [True, False], [False, True]])
    first, second = (block(x) for block, x in zip(blocks, inputs, strict=True))
    wanted = torch.stack([(first[0] + second[0]) / 2, first[1], second[2]])
    torch.testing.assert_close(LateFusion(blocks)(inputs, present), wanted)


def test_concatenation_ignores_what_a_patient_lacks():
    network, inputs = Concatenation(small_blocks()), small_inputs()
    present = torch.tensor([[True, True], [True, False], [False, True]])
    changed = [x.clone() for x in inputs]
    changed[1][1], changed[0][2] = 9.0, 9.0
    torch.testing.assert_close(network(inputs, present), network(changed, present))
    assert not torch.equal(network(inputs, present)[1], network(inputs, torch.ones(3, 2, dtype=torch.bool))[1])


def test_one_modality_takes_one_block():
    with pytest.raises(UserError, match="on one modality, not on 2"):
        OneModality(small_blocks())


def test_weights_without_effect_are_not_trained():
    network = LegoFuse(small_blocks(modality_attention="applied"), "weave")
    freeze_unused(network)
    network(small_inputs(), torch.ones(3, 2, dtype=torch.bool)).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())
    block = OneModality([small_block(modality_attention="unused")])
    freeze_unused(block)
    block([torch.randn(2, 4, 6)], torch.ones(2, 1, dtype=torch.bool)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in block.parameters())
