"""MM-Lego: a block of one modality, merged and fused blocks, and networks they are compared with, by one training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.base import BaseModule, StepOutput
from models.batch import INDEX, LABEL
from models.errors import UserError
from models.mm_lego.batch import BIN, CENSORED, PRESENT, TARGETS, TIME, modality_key
from models.mm_lego.block import LegoBlock
from models.mm_lego.metrics import class_metrics, label_metrics, survival_metrics
from models.mm_lego.networks import freeze_unused, make_blocks
from models.mm_lego.survival import class_weights, l1_penalty, survival_nll
from models.optim.schedules import Multiplier

ClassWeights = Literal["none", "inverse", "inverse_root"]
Task = Literal["survival", "classification", "multi_label"]
TRUTH: dict[Task, tuple[str, ...]] = {
    "survival": (TIME, CENSORED, BIN),
    "classification": (LABEL,),
    "multi_label": (TARGETS,),
}


class MMLegoModule(BaseModule):
    """Trains any network of blocks on survival, classes or labels (MM-Lego, arXiv 2405.19950).

    A patient with none of the network's modalities is predicted from zeros, which are the mean of standardised data.

    Args:
        model: factory ``(blocks) -> network``: :class:`~models.mm_lego.networks.OneModality`, ``LegoMerge``, ``LegoFuse``, ...
        block: factory ``(width, num_classes, encoder) -> LegoBlock``.
        encoders: factories by modality or by kind, see :func:`~models.mm_lego.networks.make_blocks`.
        class_weights: of the loss, by the counts of classes or bins of the training split; officially one of all three.
        alpha: how much the censored patients' term is left out of the survival loss.
        l1: factor of the sum of the absolute values of all trained weights, which is part of the loss, also of held-out splits.
        shapes, task, num_classes, bin_edges, class_counts: left null they are taken from the data.
    """

    def __init__(
        self,
        model: Callable[[Sequence[LegoBlock]], nn.Module],
        block: Callable[..., LegoBlock],
        encoders: Mapping[str, Callable[..., nn.Module] | None] | None = None,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Multiplier] | None = None,
        class_weights: ClassWeights = "none",
        alpha: float = 0.4,
        l1: float = 0.0,
        shapes: Mapping[str, Sequence[int]] | None = None,
        task: Task | None = None,
        num_classes: int | None = None,
        bin_edges: Sequence[float] | None = None,
        class_counts: Sequence[int] | None = None,
    ):
        super().__init__(optimizer, scheduler)
        if l1 < 0:
            raise UserError(f"module.l1={l1} would reward large weights; take 0 or more.")
        self.shapes, self.task, self.bin_edges = dict(shapes), task, bin_edges
        self.alpha, self.l1 = alpha, l1
        self.model = model(make_blocks(shapes, num_classes, block, encoders))
        freeze_unused(self.model)
        self.register_buffer("class_weights", _weights(class_weights, class_counts, num_classes), persistent=False)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*map(modality_key, self.shapes), PRESENT, *TRUTH[self.task])

    def forward(self, batch: dict) -> Tensor:
        """Class scores (B, C): logits of the hazards of each bin of time, of the classes, or of the labels."""
        present = batch[PRESENT]
        present = present | ~present.any(dim=1, keepdim=True)
        return self.model([batch[modality_key(name)] for name in self.shapes], present)

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        logits = self(batch)
        losses = self.losses(logits.float(), batch)
        if self.l1:
            losses["l1"] = self.l1 * l1_penalty(p for p in self.model.parameters() if p.requires_grad)
        if split == "train":
            return StepOutput(losses)
        rows = {INDEX: batch[INDEX], "logits": logits, **{name: batch[name] for name in TRUTH[self.task]}}
        return StepOutput(losses, outputs=rows)

    def losses(self, logits: Tensor, batch: dict) -> dict[str, Tensor]:
        weights = self.class_weights
        if self.task == "survival":
            return {"nll": survival_nll(logits, batch[BIN], batch[CENSORED], self.alpha, weights)}
        if self.task == "classification":
            return {"cross_entropy": F.cross_entropy(logits, batch[LABEL], weights)}
        return {"binary_cross_entropy": F.binary_cross_entropy_with_logits(logits, batch[TARGETS])}

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Percent, see ``*_metrics`` of :mod:`models.mm_lego.metrics`."""
        if self.task == "survival":
            return survival_metrics(rows, self.bin_edges)
        return class_metrics(rows) if self.task == "classification" else label_metrics(rows)

    def load_pretrained(self, weights: dict[str, Tensor]) -> bool:
        """Start from merged blocks: "weave" has a shared latent of its own, which they lack."""
        missing = self.state_dict().keys() ^ weights.keys()
        if missing != {"model.latent"}:
            return False
        self.load_state_dict(weights, strict=False)
        return True


def _weights(kind: ClassWeights, counts: Sequence[int] | None, num_classes: int) -> Tensor | None:
    if kind == "none":
        return None
    if counts is None:
        raise UserError(f"module.class_weights={kind}: labels of which a patient has several have no such weights. Use none.")
    labels = torch.repeat_interleave(torch.arange(num_classes), torch.tensor(counts))
    return class_weights(labels, num_classes, kind)
