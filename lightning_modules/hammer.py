"""HAMMER: detecting and grounding manipulated image-text pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.base import BaseModule, StepOutput
from models.batch import IMAGE, INDEX, TOKEN_IDS, TOKEN_MASK
from models.errors import UserError
from models.hammer.batch import BOX, FAKE, MULTI_LABEL, TOKEN_LABELS
from models.hammer.boxes import box_losses
from models.hammer.checkpoint import load_official
from models.hammer.contrastive import manipulation_contrastive
from models.hammer.evaluation import dgm4_metrics, join
from models.hammer.model import Hammer, HammerOutput, MomentumOutput
from models.hammer.parameter_groups import hammer_groups
from models.hammer.token_grounding import token_grounding

TERMS = ("contrastive", "binary", "multi_label", "box_l1", "box_giou", "token")  # officially MAC BIC MLC bbox giou TMG


class HammerModule(BaseModule):
    """Trains a :class:`~models.hammer.model.Hammer` (arXiv 2304.02556, section 3; official ``train.py``).

    Once per optimiser step, whatever the gradient accumulation: before its first forward pass the momentum towers follow the
    online ones, and after the step the momentum features of all its pieces and all processes enter the queues. Each
    piece contrasts with its own features and the queue, as each process of the official code does: 8 accumulated pieces of
    32 are the official 8 GPUs with 32 each.

    Args:
        loss_weights: by the names of ``TERMS``; officially 0.1 for contrastive, box_l1 and box_giou.
        alpha: weight of the momentum model's answers as targets; grows linearly from 0 during the first epoch.
        contrastive: False drops the contrastive term (the ablation).
        token_momentum: also learn the tokens from the momentum model.
        label_smoothing: of the tokens' cross-entropy.
        image_lr_scale, temperature_lr_scale: see :func:`~models.hammer.parameter_groups.hammer_groups`.
    """

    def __init__(
        self,
        model: Hammer,
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
        self.model, self.alpha, self.label_smoothing = model, alpha, label_smoothing
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
        self._step_begins = True
        self._to_enqueue: list[tuple[Tensor, Tensor]] = []
        self._validation: list[dict[str, Tensor]] = []

    # ---- training -------------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict, stage: str) -> StepOutput:
        inputs = batch.get(IMAGE), batch.get(TOKEN_IDS), batch.get(TOKEN_MASK)
        momentum = None
        if self.contrastive or self.token_momentum:
            if self._step_begins:
                self.model.update_momentum()
                self._step_begins = False
            self.model.clamp_temperature()
            momentum = self.model.momentum_forward(*inputs, tokens=self.token_momentum)
        output = self.model(*inputs)
        losses = self.losses(batch, output, momentum, self.current_alpha())
        if self.contrastive:
            self._to_enqueue.append((momentum.image, momentum.text))
        report = {"temperature": self.model.temp.detach().clone()} if self.contrastive else {}
        return StepOutput(losses, report)

    def losses(self, batch: dict, output: HammerOutput, momentum: MomentumOutput | None, alpha: float) -> dict[str, Tensor]:
        """The unweighted terms of a batch."""
        out = {
            "binary": F.cross_entropy(output.real_fake.float(), batch[FAKE]),
            "multi_label": F.binary_cross_entropy_with_logits(output.multi_label.float(), batch[MULTI_LABEL].float()),
        }
        if output.box is not None:
            out["box_l1"], out["box_giou"] = box_losses(output.box.float(), batch[BOX])
        if output.token is not None:
            teacher = momentum.token if self.token_momentum else None
            out["token"] = token_grounding(output.token, batch[TOKEN_LABELS], teacher, alpha, self.label_smoothing)
        if self.contrastive:
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
        self._step_begins = True

    def _of_all_processes(self, features: Tensor) -> Tensor:
        return self.all_gather(features).flatten(0, 1) if self.trainer.world_size > 1 else features

    def parameter_groups(self) -> Iterable:
        return hammer_groups(self.named_parameters(), self.image_lr_scale, self.temperature_lr_scale)

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def predict(self, batch: dict) -> dict[str, Tensor]:
        """Predictions and truths of a batch, on the CPU, as :func:`~models.hammer.evaluation.dgm4_metrics` takes them."""
        output = self.model(batch.get(IMAGE), batch.get(TOKEN_IDS), batch.get(TOKEN_MASK))
        found = {"index": batch[INDEX], "real_fake": output.real_fake.float(), "multi_label": output.multi_label.float()}
        found |= {"fake": batch[FAKE], "labels": batch[MULTI_LABEL]}
        if output.box is not None:
            found |= {"box": output.box.float(), "target_box": batch[BOX]}
        if output.token is not None:
            found |= {"token": output.token.argmax(-1), "token_labels": batch[TOKEN_LABELS]}
        return {name: value.cpu() for name, value in found.items()}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self._validation.append(self.predict(batch))

    def on_validation_epoch_end(self) -> None:
        """The metrics of the whole split, each process having seen its share of it."""
        parts = self._validation
        if self.trainer.world_size > 1:
            gathered: list = [None] * self.trainer.world_size
            dist.all_gather_object(gathered, parts)
            parts = [part for of_rank in gathered for part in of_rank]
        self._validation = []
        metrics = {name: value for name, value in dgm4_metrics(join(parts)).items() if not math.isnan(value)}
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, rank_zero_only=False)

    def load_official(self, weights: dict[str, Tensor]) -> None:
        load_official(self.model, weights)
