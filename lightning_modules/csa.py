"""CSA: alignment in closed form by canonical correlations, refined by STRUCTURE's regulariser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_modules.alignment import AlignmentModule
from lightning_modules.base import StepOutput
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.alignment.head import AlignmentHead
from models.alignment.projectors import CentredProjector
from models.errors import UserError
from models.losses.contrastive import PairLoss
from models.losses.structure import StructureRegulariser
from models.structure.csa import covariances, csa


class CSAModule(AlignmentModule):
    """The alignment module with maps that start at the closed form, found from one pass over the data before the first step.

    Each further step minimises the regulariser, minus ``correlation_weight`` times the mean correlation; with an epoch of
    steps at rate 0 it is CSA alone. Zero-shot classes are made as for every other head: normalised after projection, where
    the official code leaves the class side as it is.

    Args:
        correlation_weight: of the sum of products of unit-length embeddings over their width (official: 0.01).
        head, loss, optimizer, regulariser, vision_dim, text_dim, importer: see :class:`AlignmentModule`; the head's
            projectors are ``projector=centred`` and its norm is off; the loss is reported, not minimised.
    """

    def __init__(
        self,
        head: Callable[..., AlignmentHead],
        loss: PairLoss,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        regulariser: StructureRegulariser | None = None,
        correlation_weight: float = 0.01,
        vision_dim: int | None = None,
        text_dim: int | None = None,
        importer: Callable[[dict[str, Tensor], nn.Module], AlignmentHead] | None = None,
    ):
        super().__init__(
            head, loss, optimizer, regulariser=regulariser, vision_dim=vision_dim, text_dim=text_dim, importer=importer
        )
        self.correlation_weight = correlation_weight
        for projector in (self.head.vision_projector, self.head.text_projector):
            if not isinstance(projector, CentredProjector):
                raise UserError(
                    "module=alignment/csa needs projector=centred: its maps are the directions of canonical correlation."
                )

    def on_train_start(self) -> None:
        if self.trainer.global_step:
            return  # a resumed run has its maps
        loader = self.trainer.train_dataloader
        if self.trainer.world_size > 1:
            raise UserError("module=alignment/csa: the closed form needs all pairs on one device; set trainer.devices=1.")
        maps = csa(covariances((b[IMAGE_FEATURES], b[TEXT_FEATURES]) for b in loader), self.head.vision_projector.out_dim)
        self.head.vision_projector.set_map(maps.mean_image, maps.image_map)
        self.head.text_projector.set_map(maps.mean_text, maps.text_map)

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        step = super().shared_step(batch, split)
        a, b = (torch.nn.functional.normalize(step.outputs[name].float(), dim=-1) for name in ("image", "text"))
        losses: dict[str, Tensor] = {k: v for k, v in step.losses.items() if k == "structure"}
        losses["correlation"] = -self.correlation_weight * (a * b).sum() / a.shape[1]
        contrastive = [v.detach() for k, v in step.losses.items() if k != "structure"]
        report = {**step.report, "contrastive": reduce(torch.add, contrastive)}
        return StepOutput(losses, report, step.outputs)
