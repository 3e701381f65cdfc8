"""Fisheye + ultrasonic fusion in bird's-eye view (arXiv 2402.00637): occupancy of the ground behind the car."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import BaseModule, StepOutput
from models.batch import IMAGE, INDEX
from models.bev_fusion.batch import BEV_LABEL, CALIBRATIONS, CELSIUS, TRACES, VIEW_GRID, VIEW_VALID
from models.bev_fusion.decoder import Occupancy
from models.bev_fusion.echoes import EchoMap
from models.bev_fusion.geometry import BevGrid
from models.bev_fusion.losses import OccupancyLoss
from models.bev_fusion.metrics import cell_metrics
from models.bev_fusion.network import BEVFusion
from models.optim.parameter_groups import split_by_decay


class BevFusionModule(BaseModule):
    """Trains a :class:`~models.bev_fusion.network.BEVFusion`. The paper's training recipe is not established.

    Args:
        model: factory ``(num_classes, heights) -> BEVFusion``.
        loss: module ``(coarse logits, class logits, label) -> terms``.
        num_classes, heights, grid: of the labels and the sampling grid; left null they are taken from the data.
        echo_scale: cells of the ultrasonic map for each cell of the feature grid, per side: the encoder's stride.
        range_gain: gamma of the map's factor (D/2)^gamma.
        encoder_lr_scale: of both encoders' learning rate.
    """

    def __init__(
        self,
        model: Callable[..., BEVFusion],
        loss: OccupancyLoss,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        num_classes: int | None = None,
        heights: int | None = None,
        grid: Mapping[str, Any] | None = None,
        echo_scale: int = 4,
        range_gain: float = 0.0,
        encoder_lr_scale: float = 0.5,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        self.model = model(num_classes=num_classes, heights=heights)
        self.loss = loss
        self.num_classes, self.grid = num_classes, BevGrid(**grid)
        self.echo_map = EchoMap(self.grid.scaled(0.5).scaled(echo_scale), range_gain)
        self.encoder_lr_scale = encoder_lr_scale

    @property
    def needs(self) -> tuple[str, ...]:
        echoes = (TRACES, CALIBRATIONS, CELSIUS) if self.model.hears else ()
        return (IMAGE, VIEW_GRID, VIEW_VALID, BEV_LABEL, *echoes)

    def forward(self, batch: dict) -> Occupancy:
        """Occupancy of a batch of the keys of ``models/batch.py``."""
        return self.model(batch[IMAGE], batch[VIEW_GRID], batch[VIEW_VALID], self.echoes(batch))

    def echoes(self, batch: dict) -> Tensor | None:
        """The batch's ultrasonic maps (B, 3, rows, cols); None for a model that has no use for them."""
        if not self.model.hears:
            return None
        with torch.autocast(self.device.type, enabled=False):
            return self.echo_map(batch[TRACES].float(), batch[CALIBRATIONS].rigs, batch[CELSIUS])

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        output = self(batch)
        losses = self.loss(output.coarse, output.classes, batch[BEV_LABEL])
        if split == "train":
            return StepOutput(losses)
        # Classes, unknown cells included, fit into a byte: the maps of a whole split stay small.
        rows = {"predicted": output.classes.argmax(1).to(torch.uint8), "label": batch[BEV_LABEL].to(torch.uint8)}
        return StepOutput(losses, outputs={INDEX: batch[INDEX], **rows})

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Cell scores, in percent, of everything but free space."""
        return cell_metrics(rows["label"].numpy(), rows["predicted"].numpy(), self.num_classes)

    def parameter_groups(self) -> Iterable:
        """Encoders learn more slowly; norms and biases do not decay."""
        named = list(self.model.named_parameters())
        slow = [pair for pair in named if pair[0].startswith(("camera_encoder.", "ultrasonic_encoder."))]
        fast = [pair for pair in named if not pair[0].startswith(("camera_encoder.", "ultrasonic_encoder."))]
        groups = [{**group, "lr_scale": self.encoder_lr_scale} for group in split_by_decay(slow)]
        return [group for group in (*groups, *split_by_decay(fast)) if group["params"]]
