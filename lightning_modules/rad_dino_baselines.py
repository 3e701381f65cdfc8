"""Encoders that RAD-DINO is compared with: the same network trained on findings, or on reports."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.base import BaseModule, RowWise, StepOutput
from lightning_modules.rad_dino import class_token_metrics, class_token_rows
from models.errors import UserError
from models.optim.schedules import Multiplier
from models.rad_dino.backbone import DinoViT
from models.rad_dino.batch import FINDINGS, GLOBAL_CROPS, REPORT


class SupervisedRadiographs(BaseModule):
    """A backbone whose class token learns from labels: the binary cross-entropy of the known findings, or, as CLIP does, the
    contrast between images and reports. It sees the first global crop of each image.

    Args:
        backbone: factory of the encoder.
        labels: what it learns from.
        num_findings: of the data; null takes it from there.
        width: of the embeddings of images and reports.
    """

    def __init__(
        self,
        backbone: Callable[[], DinoViT],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Multiplier] | None = None,
        labels: Literal["findings", "reports"] = "findings",
        num_findings: int | None = None,
        width: int = 64,
    ):
        super().__init__(optimizer, scheduler)
        if labels == "findings" and not num_findings:
            raise UserError("module.labels=findings needs data with findings; datamodule has none.")
        self.encoder, self.labels = backbone(), labels
        self.encoder.mask_token.requires_grad_(False)  # nothing is masked
        self.head = nn.Linear(self.encoder.dim, num_findings if labels == "findings" else width)
        if labels == "reports":
            self.text = ReportVectors(width)
            self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def needs(self) -> tuple[str, ...]:
        return GLOBAL_CROPS, FINDINGS if self.labels == "findings" else REPORT

    def row_wise(self) -> list[RowWise]:
        return [RowWise(self.encoder)]

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        return StepOutput(self.losses(batch), outputs={} if split == "train" else class_token_rows(self.encoder, batch))

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return class_token_metrics(rows)

    def losses(self, batch: dict) -> dict[str, Tensor]:
        outputs = self.head(self.encoder(batch[GLOBAL_CROPS][:, 0]).cls)
        if self.labels == "reports":
            loss = report_contrast(outputs, self.text(batch[REPORT]), batch[REPORT], self.log_scale.exp().clamp(max=100))
            return {"contrastive": loss}
        known = batch[FINDINGS] >= 0
        entropy = F.binary_cross_entropy_with_logits(outputs, batch[FINDINGS].clamp_min(0).to(outputs), reduction="none")
        return {"findings": (entropy * known).sum() / known.sum().clamp_min(1)}


class ReportVectors(nn.Module):
    """Reports as a linear function of the mean vector of their words and of their pairs of neighbouring words.

    Args:
        width: of the vectors.
        buckets: rows of the table that words are hashed into.
    """

    def __init__(self, width: int, buckets: int = 4096):
        super().__init__()
        self.buckets = buckets
        self.table, self.linear = nn.EmbeddingBag(buckets, width, mode="mean"), nn.Linear(width, width)

    def forward(self, reports: Sequence[str]) -> Tensor:
        """(B, width) of B reports."""
        bags = [[zlib.crc32(term.encode()) % self.buckets for term in _terms(report)] for report in reports]
        device = self.linear.weight.device
        starts = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)[:-1].to(device)
        return self.linear(self.table(torch.tensor([term for bag in bags for term in bag], device=device), starts))


def report_contrast(images: Tensor, reports: Tensor, texts: Sequence[str], scale: Tensor) -> Tensor:
    """CLIP's loss within the batch of this process; equal reports share the probability of a match.

    Args:
        images, reports: (B, E) embeddings.
        texts: B reports.
        scale: of the cosines.
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(reports, dim=1).T
    numbers = {text: number for number, text in enumerate(texts)}
    number_of = torch.tensor([numbers[text] for text in texts], device=logits.device)
    same = (number_of[:, None] == number_of).to(logits.dtype)
    targets = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _terms(report: str) -> list[str]:
    words = report.lower().replace(".", " . ").split() or [""]
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
