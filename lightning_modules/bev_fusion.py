"""Fisheye + ultrasonic fusion in bird's-eye view (arXiv 2402.00637): occupancy of the ground behind the car."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.base import BaseModule, StepOutput
from models.batch import IMAGE
from models.bev_fusion.batch import BEV_LABEL, CALIBRATIONS, CELSIUS, TRACES, VIEW_GRID, VIEW_VALID
from models.bev_fusion.decoder import Occupancy
from models.bev_fusion.echoes import EchoMap
from models.bev_fusion.geometry import BevGrid
from models.bev_fusion.metrics import cell_scores, confusion
from models.bev_fusion.network import BEVFusion
from models.optim.parameter_groups import split_by_decay


class BevFusionModule(BaseModule):
    """Trains a :class:`~models.bev_fusion.network.BEVFusion`. The paper's training recipe is not established.

    Args:
        model: factory ``(classes, heights) -> BEVFusion``.
        loss: module ``(coarse logits, class logits, label) -> terms``.
        classes, heights, grid: of the labels and the sampling grid; left null they are taken from the data.
        echo_scale: cells of the ultrasonic map for each cell of the feature grid, per side: the encoder's stride.
        range_gain: gamma of the map's factor (D/2)^gamma.
        encoder_lr_scale: of both encoders' learning rate.
    """

    def __init__(
        self,
        model: Callable[..., BEVFusion],
        loss: nn.Module,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        classes: int | None = None,
        heights: int | None = None,
        grid: Mapping[str, Any] | None = None,
        echo_scale: int = 4,
        range_gain: float = 0.0,
        encoder_lr_scale: float = 0.5,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        self.model = model(classes=classes, heights=heights)
        self.loss = loss
        self.classes, self.grid = classes, BevGrid(**grid)
        self.echo_map = EchoMap(self.grid.scaled(0.5).scaled(echo_scale), range_gain)
        self.encoder_lr_scale = encoder_lr_scale
        self._confusion = np.zeros((classes, classes), np.int64)

    def forward(self, batch: dict) -> Occupancy:
        """Occupancy of a batch of the keys of ``models/batch.py``."""
        return self.model(batch[IMAGE], batch[VIEW_GRID], batch[VIEW_VALID], self.echoes(batch))

    def echoes(self, batch: dict) -> Tensor | None:
        """The batch's ultrasonic maps (B, 3, rows, cols); None for a model that has no use for them."""
        if not self.model.hears:
            return None
        with torch.autocast(self.device.type, enabled=False):
            return self.echo_map(batch[TRACES].float(), batch[CALIBRATIONS].rigs, batch[CELSIUS])

    def shared_step(self, batch: dict, stage: str) -> StepOutput:
        found = self(batch)
        terms = self.loss(found.coarse, found.classes, batch[BEV_LABEL])
        return StepOutput(terms, outputs={"predicted": found.classes.argmax(1)})

    def validation_step(self, batch: dict, batch_idx: int) -> StepOutput:
        step = super().validation_step(batch, batch_idx)
        predicted = step.outputs["predicted"].cpu().numpy()
        self._confusion += confusion(batch[BEV_LABEL].cpu().numpy(), predicted, self.classes)
        return step

    def on_validation_epoch_end(self) -> None:
        """Cell scores, in percent, of everything but free space."""
        matrix = torch.from_numpy(self._confusion).to(self.device)
        if self.trainer.world_size > 1:
            matrix = self.all_gather(matrix).sum(0)
        scores = cell_scores(matrix.cpu().numpy())
        self._confusion[:] = 0
        self.log_dict({f"val/{name}": 100 * float(scores[name][1:].mean()) for name in ("iou", "precision", "recall")})

    def parameter_groups(self) -> Iterable:
        """Encoders learn more slowly; norms and biases do not decay."""
        named = list(self.model.named_parameters())
        slow = [pair for pair in named if pair[0].startswith(("camera_encoder.", "ultrasonic_encoder."))]
        fast = [pair for pair in named if not pair[0].startswith(("camera_encoder.", "ultrasonic_encoder."))]
        groups = [{**group, "lr_scale": self.encoder_lr_scale} for group in split_by_decay(slow)]
        return [group for group in (*groups, *split_by_decay(fast)) if group["params"]]
