"""The alignment module: what stops it, what it clamps, which parameters decay."""

import math
from functools import partial

import pytest
import torch

from lightning_modules.alignment import AlignmentModule
from lightning_modules.base import LossNotFinite
from models.alignment.batch import EXTRA_TEXT_FEATURES, IMAGE_FEATURES, STRUCTURE_IMAGE, TEXT_FEATURES
from models.alignment.head import AlignmentHead
from models.alignment.projectors import LinearProjector
from models.batch import INDEX
from models.errors import UserError
from models.losses.contrastive import SigmoidLoss
from models.losses.structure import StructureRegulariser, structure_loss


def _module(**arguments) -> AlignmentModule:
    head = partial(AlignmentHead, embed_dim=4, projector=LinearProjector)
    return AlignmentModule(head=head, loss=SigmoidLoss(), vision_dim=6, text_dim=5, **arguments)


def _batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 6, generator=generator)
    text, extra = (torch.randn(3, 5, generator=generator) for _ in range(2))
    return {INDEX: torch.tensor([7, 8, 9]), IMAGE_FEATURES: image, TEXT_FEATURES: text, EXTRA_TEXT_FEATURES: extra}


def test_loss_that_is_not_finite_stops_with_term_and_samples():
    module, batch = _module(), _batch()
    assert torch.isfinite(module.batch_loss(batch))
    batch[IMAGE_FEATURES][1, 2] = float("nan")
    with pytest.raises(LossNotFinite, match=r"step 0: contrastive=nan.*\[7, 8, 9\]"):
        module.batch_loss(batch)


def test_weight_of_an_unknown_term_is_refused():
    module, batch = _module(loss_weights={"contrastiv": 2.0}), _batch()
    with pytest.raises(UserError, match="contrastiv"):
        module.batch_loss(batch)


def test_log_scale_is_clamped_after_the_step():
    module = _module()
    with torch.no_grad():
        module.head.logit_scale.fill_(9.0)
        module.after_optimizer_step()
    assert module.head.logit_scale.item() == pytest.approx(math.log(100))


def test_decay_groups():
    everything = list(_module().parameter_groups())
    decayed, spared = _module(decay_all=False).parameter_groups()
    assert spared["weight_decay"] == 0
    assert len(everything) == len(decayed["params"]) + len(spared["params"])
    assert {p.ndim for p in decayed["params"]} == {2}


def test_regulariser_sees_samples_beside_the_batch():
    batch = _batch()
    more = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    module = _module(regulariser=StructureRegulariser(warmup_steps=0, extra="replace"))
    found = module.shared_step(batch | {STRUCTURE_IMAGE: more}, "train").report["structure"]
    text = module.head.encode_text(batch[TEXT_FEATURES])
    wanted = [
        structure_loss(more, module.head.encode_image(more), 1, 0.05),
        structure_loss(batch[TEXT_FEATURES], text, 1, 0.05),
    ]
    torch.testing.assert_close(found, torch.stack(wanted).mean().detach())
