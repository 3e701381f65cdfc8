"""RAD-DINO: DINOv2's self-supervised training, from nothing or continued from a released encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_modules.base import BaseModule, RowWise, StepOutput
from models.batch import IMAGE, INDEX
from models.errors import UserError
from models.optim.schedules import Multiplier
from models.rad_dino.backbone import DinoViT
from models.rad_dino.batch import FINDINGS, GLOBAL_CROPS, LOCAL_CROPS, MASK_INDICES, MASK_WEIGHTS, MASKS
from models.rad_dino.checkpoint import load_official
from models.rad_dino.model import StudentAndTeacher
from models.rad_dino.parameter_groups import dino_groups
from models.rad_dino.probing import neighbour_metrics
from models.rad_dino.schedules import cosine, peak_rate, teacher_temperature

TERMS = ("dino_local", "dino_global", "koleo", "ibot")


class RadDinoModule(BaseModule):
    """Trains a :class:`~models.rad_dino.model.StudentAndTeacher` (arXiv 2304.07193; on chest X-rays 2401.10815).

    Held-out splits give the same losses on crops that never change, and k-NN metrics of the teacher's class tokens among
    themselves. The teacher is what evaluation and export use.

    Args:
        model: factory of student and teacher.
        loss_weights: by the names of ``TERMS``; officially 0.1 for koleo and 1 for the others.
        weight_decay_end: the weight decay follows a cosine from the optimiser's value to this one; None: it stays.
        momentum: of the teacher at the first step; follows a cosine to 1.
        temperature, temperature_start: of the teacher, at the end and the start of its warm-up.
        temperature_epochs: length of that warm-up.
        freeze_last_layer_epochs: how long the prototypes keep their first values.
        epoch_length: optimiser steps that the settings in epochs count as one (officially 1,250); None: those of the data.
        reference_batch: total images per step, by whose square root ``optimizer.lr`` is scaled (1,024 images: factor 1); None:
            the rate is taken as it is.
        layer_decay, patch_embed_scale: see :func:`~models.rad_dino.parameter_groups.rule_of`.
        max_norm: L2 norm that the gradients of the backbone and of each head are clipped to; None: no clipping.
    """

    def __init__(
        self,
        model: Callable[[], StudentAndTeacher],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Multiplier] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        weight_decay_end: float | None = None,
        momentum: float = 0.992,
        temperature: float = 0.07,
        temperature_start: float = 0.04,
        temperature_epochs: float = 30,
        freeze_last_layer_epochs: float = 1,
        epoch_length: int | None = None,
        reference_batch: int | None = None,
        layer_decay: float = 0.9,
        patch_embed_scale: float = 0.2,
        max_norm: float | None = 3.0,
    ):
        unknown = sorted((loss_weights or {}).keys() - set(TERMS))
        if unknown:
            raise UserError(f"module.loss_weights names {unknown}; the terms are {', '.join(TERMS)}.")
        super().__init__(optimizer, scheduler)
        self.model = model = model()
        present = TERMS if model.patch_objective else TERMS[:-1]
        self.term_weights = {name: weight for name, weight in (loss_weights or {}).items() if name in present}
        self.weight_decay_end, self.momentum = weight_decay_end, momentum
        self.temperature, self.temperature_start, self.temperature_epochs = temperature, temperature_start, temperature_epochs
        self.freeze_last_layer_epochs, self.epoch_length, self.reference_batch = (
            freeze_last_layer_epochs, epoch_length, reference_batch,
        )  # fmt: skip
        self.layer_decay, self.patch_embed_scale, self.max_norm = layer_decay, patch_embed_scale, max_norm

    needs_whole_batch = True  # for Sinkhorn-Knopp's or the centre's targets, and KoLeo
    needs = (GLOBAL_CROPS, LOCAL_CROPS, MASKS, MASK_INDICES, MASK_WEIGHTS)

    @classmethod
    def conflicts(cls, config: Mapping[str, Any]) -> list[str]:
        problems = super().conflicts(config)
        scaled = str(config["trainer"].get("precision")) in ("16-mixed", "16")
        if scaled and (config.get("optimizer") or {}).get("fused") and config["module"].get("max_norm", 3.0) is not None:
            problems.append(
                "module.max_norm: a fused optimizer unscales float16 gradients after they are clipped. Set "
                "optimizer.fused=false, or train in bf16-mixed."
            )
        return problems

    @property
    def encoder(self) -> DinoViT:
        """The teacher's backbone."""
        return cast(DinoViT, self.model.teacher["backbone"])

    def compiled_parts(self) -> list[nn.Module]:
        """The layers inside the blocks, and the heads' MLPs: a block is called through a method that takes several crops."""
        networks = [self.model.student, self.model.teacher]
        blocks = [block for network in networks for block in cast(DinoViT, network["backbone"]).blocks]
        heads = [part for network in networks for name, part in network.items() if name != "backbone"]
        return [part for block in blocks for part in (block.attn, block.mlp)] + [head.mlp for head in heads]

    def row_wise(self) -> list[RowWise]:
        """Both backbones. Stochastic depth by subsets draws those of a piece."""
        student, teacher = (network["backbone"] for network in (self.model.student, self.model.teacher))
        return [RowWise(student, "forward_crops", groups=True), RowWise(teacher)]

    # ---- training -------------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        local = batch[LOCAL_CROPS]
        temperature = self.temperature if split != "train" else self.at_this_step("temperature")
        losses = self.model.losses(
            by_view(batch[GLOBAL_CROPS]),
            by_view(local) if local.shape[1] else None,
            by_view(batch[MASKS]),
            batch[MASK_INDICES],
            batch[MASK_WEIGHTS],
            temperature,
            targets_move=split == "train",
        )
        self.loss_weights = {name: weight for name, weight in self.term_weights.items() if name in losses}
        return StepOutput(losses, outputs={} if split == "train" else class_token_rows(self.encoder, batch))

    def at_this_step(self, quantity: str) -> float:
        """``temperature`` or ``momentum`` of the teacher, or ``weight_decay``, at the optimiser step that is being taken."""
        step = self.global_step
        if quantity == "temperature":
            warmup = int(self.temperature_epochs * self.steps_per_epoch())
            return teacher_temperature(step, self.temperature, self.temperature_start, warmup)
        total = int(self.trainer.estimated_stepping_batches)
        if quantity == "momentum":
            return cosine(step, self.momentum, 1.0, total)
        first = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False)).defaults["weight_decay"]
        return cosine(step, first, first if self.weight_decay_end is None else self.weight_decay_end, total)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        decay = self.at_this_step("weight_decay")
        for group in optimizer.param_groups:
            group["weight_decay"] = decay * group["decay_scale"]
        if self.max_norm is not None:
            self.model.clip_gradients(self.max_norm)
        # Lightning counts the step before `after_optimizer_step` runs.
        self._momentum_of_step = self.at_this_step("momentum")

    def after_optimizer_step(self) -> None:
        self.model.update_teacher(self._momentum_of_step)

    def steps_per_epoch(self) -> int:
        return self.epoch_length or super().steps_per_epoch()

    def parameter_groups(self) -> Iterable:
        depth = len(self.encoder.blocks)
        named = self.model.student.named_parameters()
        return dino_groups(named, depth, self.layer_decay, self.patch_embed_scale)

    def configure_optimizers(self) -> Any:
        """One schedule for all groups, each times its own factor; the last layers' groups begin at zero."""
        if self.optimizer_factory is None:
            raise UserError(f"{type(self).__name__} was built without an optimizer; choose one: optimizer=<name>.")
        optimizer = self.optimizer_factory(self.parameter_groups())
        peak = optimizer.defaults["lr"]
        if self.reference_batch is not None:
            peak = peak_rate(peak, self.reference_batch)
        multiplier = self.multiplier(peak) if self.scheduler_factory is not None else lambda step: 1.0
        frozen = self.freeze_last_layer_epochs * self.steps_per_epoch()
        for group in optimizer.param_groups:
            group["lr"] = peak * group["lr_scale"]
        rules = [lambda step: 0.0 if step < frozen else multiplier(step), multiplier]
        of_groups = [rules[0] if group["last_layer"] else rules[1] for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, of_groups)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict, batch_idx: int = 0) -> dict[str, Tensor]:
        return class_token_rows(self.encoder, batch)

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return class_token_metrics(rows)

    def load_official(self, weights: dict[str, Tensor]) -> None:
        load_official(self.model, weights)


def class_token_rows(encoder: DinoViT, batch: dict) -> dict[str, Tensor]:
    """The class tokens of whole images, with the truth."""
    return {INDEX: batch[INDEX], "features": encoder(batch[IMAGE]).cls.float(), "findings": batch[FINDINGS]}


def class_token_metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """k-NN metrics of each image among the others of its split, where the data has findings, and the features' rank."""
    return {name: value for name, value in neighbour_metrics(rows).items() if not math.isnan(value)}


def by_view(x: Tensor) -> Tensor:
    """(B, V, ...) to (V * B, ...), the first view of all images first."""
    return x.transpose(0, 1).flatten(0, 1)
