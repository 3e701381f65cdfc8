"""Training steps of blocks, merged and fused blocks."""

from functools import partial

import pytest
import torch

from models.batch import INDEX
from models.errors import UserError
from models.mm_lego.batch import PRESENT, modality_key
from models.mm_lego.block import LegoBlock
from models.mm_lego.fuse import LegoFuse
from models.mm_lego.merge import LegoMerge
from models.mm_lego.networks import OneModality
from models.mm_lego.survival import l1_penalty
from tests.lightning_modules.small import PATIENTS, _mm_lego, _patients, built


def test_a_patient_without_any_modality_is_predicted_from_zeros():
    module, batch = built("mm_lego").eval(), _patients(4)
    batch[PRESENT][1] = False
    for name in PATIENTS:
        batch[modality_key(name)][1] = 0
    torch.testing.assert_close(module(batch)[1], module(batch | {PRESENT: torch.ones(4, 2, dtype=torch.bool)})[1])


def test_the_penalty_is_part_of_the_loss():
    module, batch = built("mm_lego_block"), _patients(5)
    losses = module.shared_step(batch, "val").losses
    torch.testing.assert_close(losses["l1"], 1e-3 * l1_penalty(module.model.parameters()))
    assert module.shared_step(batch, "val").outputs[INDEX].tolist() == list(range(5))


def test_weave_starts_from_merged_blocks():
    make = partial(_mm_lego, task="survival", modalities=tuple(PATIENTS))
    merged, woven, stacked = make(LegoMerge), make(partial(LegoFuse, method="weave")), make(LegoFuse)
    assert woven.load_pretrained(merged.state_dict())
    assert all(torch.equal(value, woven.state_dict()[name]) for name, value in merged.state_dict().items())
    assert stacked.state_dict().keys() == merged.state_dict().keys()  # loaded without this method
    assert not woven.load_pretrained(_mm_lego(OneModality, "survival", ("table",)).state_dict())


def test_a_negative_penalty_and_a_block_without_steps_are_refused():
    with pytest.raises(UserError, match="module.l1=-1"):
        _mm_lego(LegoMerge, "survival", tuple(PATIENTS), l1=-1)
    with pytest.raises(UserError, match="module.block.depth=0"):
        LegoBlock(4, 2, depth=0)


def test_several_labels_have_no_class_weights():
    with pytest.raises(UserError, match="have no such weights"):
        _mm_lego(LegoMerge, "multi_label", tuple(PATIENTS), class_weights="inverse", class_counts=None)
