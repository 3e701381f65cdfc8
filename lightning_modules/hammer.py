"""HAMMER: detecting and grounding manipulated image-text pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.base import BaseModule, RowWise, StepOutput
from models.batch import IMAGE, INDEX, TOKEN_IDS, TOKEN_MASK
from models.errors import UserError
from models.hammer.batch import BOX, FAKE, MULTI_LABEL, TOKEN_LABELS
from models.hammer.checkpoint import load_official
from models.hammer.contrastive import manipulation_contrastive
from models.hammer.evaluation import dgm4_metrics
from models.hammer.grounding import box_losses, token_grounding
from models.hammer.model import Hammer, HammerOutput, MomentumOutput
from models.hammer.parameter_groups import hammer_groups

TERMS = ("contrastive", "binary", "multi_label", "box_l1", "box_giou", "token")  # officially MAC BIC MLC bbox giou TMG


class HammerModule(BaseModule):
    """Trains a :class:`~models.hammer.model.Hammer` (arXiv 2304.02556, section 3; official ``train.py``).

    Once per optimiser step, whatever the gradient accumulation: before its first forward pass the momentum towers follow the
    online ones, and after the step the momentum features of all its pieces and all processes enter the queues. Each
    piece contrasts with its own features and the queue, as each process of the official code does: 8 accumulated pieces of
    32 are the official 8 GPUs with 32 each.

    Args:
        model: factory of the network.
        loss_weights: by the names of ``TERMS``; officially 0.1 for contrastive, box_l1 and box_giou.
        alpha: weight of the momentum model's answers as targets; grows linearly from 0 during the first epoch.
        contrastive: False drops the contrastive term (the ablation).
        token_momentum: also learn the tokens from the momentum model.
        label_smoothing: of the tokens' cross-entropy.
        image_lr_scale, temperature_lr_scale: see :func:`~models.hammer.parameter_groups.hammer_groups`.
    """

    def __init__(
        self,
        model: Callable[[], Hammer],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        alpha: float = 0.4,
        contrastive: bool = True,
        token_momentum: bool = True,
        label_smoothing: float = 0.0,
        image_lr_scale: float | None = 5.0,
        temperature_lr_scale: float = 1.0,
    ):
        unknown = sorted((loss_weights or {}).keys() - set(TERMS))
        if unknown:
            raise UserError(f"module.loss_weights names {unknown}; HAMMER's terms are {', '.join(TERMS)}.")
        super().__init__(optimizer, scheduler)
        self.model = model = model()
        self.alpha, self.label_smoothing = alpha, label_smoothing
        self.image_lr_scale, self.temperature_lr_scale = image_lr_scale, temperature_lr_scale
        both = model.modality == "both"
        self.contrastive, self.token_momentum = contrastive and both, token_momentum and both
        absent = {"image": ("token",), "text": ("box_l1", "box_giou"), "both": ()}[model.modality]
        absent += () if self.contrastive else ("contrastive",)
        self.loss_weights = {name: weight for name, weight in (loss_weights or {}).items() if name not in absent}
        if both and not self.contrastive:  # DDP wants a gradient for whatever asks for one
            for part in (model.vision_proj, model.text_proj, model.temp):
                part.requires_grad_(False)
        if both:
            # All processes enqueue the same features, so that DDP need not broadcast 134 MB before every forward pass.
            names = ("image_queue", "text_queue", "queue_ptr")
            self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name in names]
        self._to_enqueue: list[tuple[Tensor, Tensor]] = []

    @property
    def needs(self) -> tuple[str, ...]:
        image = (IMAGE, BOX) if self.model.modality != "text" else ()
        text = (TOKEN_IDS, TOKEN_MASK, TOKEN_LABELS) if self.model.modality != "image" else ()
        return (*image, *text, FAKE, MULTI_LABEL)

    # ---- training -------------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        inputs = batch.get(IMAGE), batch.get(TOKEN_IDS), batch.get(TOKEN_MASK)
        if split != "train":
            output = self.model(*inputs)
            return StepOutput(self.losses(batch, output, None, 0.0), outputs=_rows(batch, output))
        momentum = None
        if self.contrastive or self.token_momentum:
            self.model.clamp_temperature()
            momentum = self.model.momentum_forward(*inputs, tokens=self.token_momentum)
        losses = self.losses(batch, self.model(*inputs), momentum, self.current_alpha())
        if self.contrastive:
            self._to_enqueue.append((momentum.image, momentum.text))
        report = {"temperature": self.model.temp.detach().clone()} if self.contrastive else {}
        return StepOutput(losses, report)

    def row_wise(self) -> list[RowWise]:
        return [RowWise(self.model), RowWise(self.model, "momentum_forward")]

    def before_forward(self) -> None:
        if self.contrastive or self.token_momentum:
            self.model.update_momentum()

    def losses(self, batch: dict, output: HammerOutput, momentum: MomentumOutput | None, alpha: float) -> dict[str, Tensor]:
        """The unweighted terms of a batch; without ``momentum`` those of the labels alone, as held-out splits have them."""
        out = {
            "binary": F.cross_entropy(output.real_fake.float(), batch[FAKE]),
            "multi_label": F.binary_cross_entropy_with_logits(output.multi_label.float(), batch[MULTI_LABEL].float()),
        }
        if output.box is not None:
            out["box_l1"], out["box_giou"] = box_losses(output.box.float(), batch[BOX])
        if output.token is not None:
            teacher = momentum.token if momentum is not None and self.token_momentum else None
            out["token"] = token_grounding(output.token, batch[TOKEN_LABELS], teacher, alpha, self.label_smoothing)
        if momentum is not None and self.contrastive:
            out["contrastive"] = manipulation_contrastive(
                *self.model.features(output),
                momentum.image,
                momentum.text,
                self.model.image_queue,
                self.model.text_queue,
                self.model.temp,
                batch[FAKE] == 0,
                alpha,
            ).mean
        return out

    def current_alpha(self) -> float:
        """``alpha``, after a linear rise over the optimiser steps of the first epoch."""
        return self.alpha * min(1.0, self.global_step / self.steps_per_epoch())

    def after_optimizer_step(self) -> None:
        """The step's backward passes are over: the queues may change."""
        if self._to_enqueue:
            image, text = (torch.cat(parts) for parts in zip(*self._to_enqueue, strict=True))
            self.model.enqueue(self._of_all_processes(image), self._of_all_processes(text))
        self._to_enqueue.clear()

    def _of_all_processes(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.all_gather(features)).flatten(0, 1) if self.trainer.world_size > 1 else features

    def parameter_groups(self) -> Iterable:
        return hammer_groups(self.named_parameters(), self.image_lr_scale, self.temperature_lr_scale)

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """DGM4's metrics in percent, without those that have no value: of a class that does not occur, for example."""
        return {name: value for name, value in dgm4_metrics(rows).items() if not math.isnan(value)}

    def load_official(self, weights: dict[str, Tensor]) -> None:
        load_official(self.model, weights)


def _rows(batch: dict, output: HammerOutput) -> dict[str, Tensor]:
    """Predictions and truths as :func:`~models.hammer.evaluation.dgm4_metrics` takes them."""
    rows = {INDEX: batch[INDEX], "real_fake": output.real_fake, "multi_label": output.multi_label}
    rows |= {"fake": batch[FAKE], "labels": batch[MULTI_LABEL]}
    if output.box is not None:
        rows |= {"box": output.box, "target_box": batch[BOX]}
    if output.token is not None:
        rows |= {"token": output.token.argmax(-1), "token_labels": batch[TOKEN_LABELS]}
    return rows
