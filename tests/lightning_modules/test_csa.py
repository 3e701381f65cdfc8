"""CSA: the maps start at the closed form of all training pairs, and the regulariser refines them."""

from functools import partial

import pytest
import torch

from lightning_modules.csa import CSAModule
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.alignment.head import AlignmentHead
from models.alignment.projectors import CentredProjector, LinearProjector
from models.errors import UserError
from models.losses.contrastive import InfoNCELoss
from models.structure.csa import covariances, csa
from tests.lightning_modules.small import MODULES, Data, trainer


def module(lr: float, projector=CentredProjector) -> CSAModule:
    head = partial(AlignmentHead, embed_dim=4, projector=projector, norm=False, learn_scale=False)
    return CSAModule(head, InfoNCELoss(), partial(torch.optim.SGD, lr=lr), vision_dim=6, text_dim=5)


def fit(built: CSAModule, tmp_path) -> None:
    data = Data("csa", 6, 12, 4)
    trainer(default_root_dir=tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(built, datamodule=data)


def test_an_epoch_at_rate_0_is_the_closed_form(tmp_path):
    built = module(lr=0.0)
    fit(built, tmp_path)
    rows = MODULES["csa"].rows(12)
    maps = csa(covariances([(rows[IMAGE_FEATURES], rows[TEXT_FEATURES])]), 4)
    for projector, mean, weights in (
        (built.head.vision_projector, maps.mean_image, maps.image_map),
        (built.head.text_projector, maps.mean_text, maps.text_map),
    ):
        other = CentredProjector(len(mean), 4)
        other.set_map(mean, weights)
        x = torch.randn(3, len(mean), generator=torch.Generator().manual_seed(0))
        # Singular vectors are unique up to their sign.
        torch.testing.assert_close(projector(x).abs(), other(x).abs(), rtol=1e-3, atol=1e-4)


def test_further_steps_move_the_maps(tmp_path):
    still, moved = module(lr=0.0), module(lr=0.5)
    fit(still, tmp_path)
    fit(moved, tmp_path)
    assert any(not torch.equal(a, b) for a, b in zip(still.parameters(), moved.parameters(), strict=True))


def test_other_projectors_are_refused():
    with pytest.raises(UserError, match="projector=centred"):
        module(0.1, LinearProjector)
