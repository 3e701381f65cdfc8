"""Projector alignment: two frozen encoders joined by small trainable projectors, trained on their cached features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from datamodules.batch import EXTRA_TEXT_FEATURES, IMAGE_FEATURES, TEXT_FEATURES
from lightning_modules.base import BaseModule, StepOutput
from models.alignment import AlignmentHead
from models.metrics.retrieval import validation_retrieval
from models.parameter_groups import split_by_decay
from models.sail.checkpoint import head_from_official


class AlignmentModule(BaseModule):
    """Trains an :class:`~models.alignment.AlignmentHead` with a contrastive loss (SAIL, arXiv 2412.04616, section 3).

    Args:
        head: factory ``(vision_dim, text_dim) -> AlignmentHead``.
        loss: module ``(image, texts, logit_scale, logit_bias) -> LossOutput``.
        vision_dim, text_dim: widths of the frozen features; left null they are taken from the data.
        decay_all: weight decay on every parameter, as SAIL does with LION; False spares biases, norms, scale and bias.
        max_log_scale: the log of the logit scale is clamped to [0, this] after each step (official: ln 100).
    """

    needs_whole_batch = True

    def __init__(
        self,
        head: Callable[..., AlignmentHead],
        loss: nn.Module,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[int], Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        vision_dim: int | None = None,
        text_dim: int | None = None,
        decay_all: bool = True,
        max_log_scale: float = math.log(100),
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        self.head = head(vision_dim=vision_dim, text_dim=text_dim)
        self.loss = loss
        self.decay_all = decay_all
        self.max_log_scale = max_log_scale
        self._validation: list[Mapping[str, Tensor]] = []

    def shared_step(self, batch: dict, stage: str) -> StepOutput:
        image = self.head.encode_image(batch[IMAGE_FEATURES])
        texts = [self.head.encode_text(batch[key]) for key in (TEXT_FEATURES, EXTRA_TEXT_FEATURES) if key in batch]
        loss = self.loss(image, texts, self.head.logit_scale.exp(), self.head.logit_bias)
        scale = {"logit_scale": self.head.logit_scale.detach().exp(), "logit_bias": self.head.logit_bias.detach()}
        return StepOutput(loss.losses, {**loss.report, **scale}, {"image": image, "text": texts[0]})

    def parameter_groups(self) -> Iterable:
        if self.decay_all:
            return super().parameter_groups()
        return split_by_decay(self.head.named_parameters())

    def after_optimizer_step(self) -> None:
        self.head.logit_scale.clamp_(0, self.max_log_scale)

    def validation_step(self, batch: dict, batch_idx: int) -> StepOutput:
        step = super().validation_step(batch, batch_idx)
        self._validation.append({name: value.float().cpu() for name, value in step.outputs.items()})
        return step

    def on_validation_epoch_end(self) -> None:
        """The official in-training validator: one-to-one retrieval between images and their first captions."""
        image, text = (torch.cat([part[name] for part in self._validation]) for name in ("image", "text"))
        self._validation.clear()
        metrics = validation_retrieval(image, text)
        self.log_dict({f"val/retrieval/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def load_official(self, weights: dict[str, Tensor]) -> None:
        self.head = head_from_official(weights)
