"""Probes of frozen encoders for several findings at once: k nearest neighbours, and linear classifiers over a grid of rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.metrics.knn import knn_votes
from models.metrics.multi_label import auroc, tied_average_precision
from models.rad_dino.backbone import DinoViT

NEIGHBOURS = 20
# Rates of DINOv2's linear evaluation, for batches of 256.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
REFERENCE_BATCH = 256
MOMENTUM = 0.9


def probe_features(encoder: DinoViT, images: Tensor, blocks: Sequence[int] = (1, 4)) -> dict[str, Tensor]:
    """Class tokens of the last blocks side by side, without and with the mean of the last block's patches: (B, D') each.

    Args:
        encoder: in eval mode.
        images: (B, 3, H, W).
        blocks: how many of the last blocks; officially 1 and 4.
    """
    outputs = encoder.intermediate(images, min(max(blocks), len(encoder.blocks)))
    mean, features = outputs[-1].patches.mean(dim=1), {}
    for count in blocks:
        tokens = torch.cat([output.cls for output in outputs[-count:]], dim=1)
        features[f"{count}_cls"] = tokens.float()
        features[f"{count}_cls_patches"] = torch.cat([tokens, mean], dim=1).float()
    return features


def known_metrics(scores: Tensor, findings: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) AUROC and (C,) average precision in percent over the rows where each finding is known; NaN where undefined.

    Args:
        scores: (N, C).
        findings: (N, C), 1, 0 or -1 for unknown.
    """
    columns = []
    for score, finding in zip(scores.T, findings.T, strict=True):
        known = finding >= 0
        column = score[known, None], finding[known, None] == 1
        if not len(column[0]):
            columns.append(torch.full((2,), math.nan, dtype=torch.float64))
        else:
            columns.append(torch.cat([auroc(*column).double(), tied_average_precision(*column).double()]))
    return (100 * torch.stack(columns, dim=1)).unbind(0)  # type: ignore[return-value]


def neighbour_scores(
    train: Tensor, train_findings: Tensor, test: Tensor, k: int = NEIGHBOURS, temperature: float = 0.07
) -> Tensor:
    """(N, C) share of the similarity-weighted votes of the k nearest training rows, by cosine, that have the finding.

    Args:
        train, test: (M, D) and (N, D) features.
        train_findings: (M, C); rows where a finding is unknown do not vote on it.
        k: neighbours; all rows where there are fewer.
        temperature: of the votes' exponential.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    scores = []
    for finding in train_findings.T:
        known = finding >= 0
        votes = knn_votes(train[known], finding[known], test, 2, k, temperature)
        scores.append(votes[:, 1] / votes.sum(dim=1))
    return torch.stack(scores, dim=1)


def neighbour_metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """Mean AUROC of each row's nearest neighbours among the other half of the rows, and the effective rank of the features.

    The effective rank is the exponential of the entropy of the normalised singular values: it falls when features collapse.
    """
    features, findings = rows["features"], rows["findings"]
    values = torch.linalg.svdvals((features - features.mean(dim=0)).double())
    share = values / values.sum().clamp_min(1e-12)
    metrics = {"features/effective_rank": float((-(share * share.clamp_min(1e-12).log()).sum()).exp())}
    usable = findings.shape[1] and len(features) > 1 and bool((findings >= 0).all(dim=1).any())
    if not usable:
        return metrics
    scores = torch.empty(len(features), findings.shape[1])
    halves = [torch.arange(start, len(features), 2) for start in (0, 1)]
    for query, stored in (halves, halves[::-1]):
        scores[query] = neighbour_scores(features[stored], findings[stored], features[query])
    area = known_metrics(scores, findings)[0].nanmean()
    return metrics | {"knn/auroc": float(area)}


class AgeProbe(NamedTuple):
    """``values = (features - mean) weight + bias``."""

    mean: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N,) values of features (N, D)."""
        return (features.double() - self.mean) @ self.weight + self.bias


def fit_ridge(features: Tensor, values: Tensor, penalty: float) -> AgeProbe:
    """Least squares with an L2 penalty, in closed form.

    Args:
        features: (N, D).
        values: (N,) of a number such as the age; NaN does not count.
        penalty: of the squared weights, in multiples of N times the mean variance of the features.
    """
    known = ~values.isnan()
    x, y = features[known].double(), values[known].double()
    mean, bias = x.mean(dim=0), y.mean()
    centred = x - mean
    covariance = centred.T @ centred
    covariance.diagonal().add_(penalty * covariance.diagonal().mean().clamp_min(1e-12))
    return AgeProbe(mean, torch.linalg.solve(covariance, centred.T @ (y - bias)), bias)


class LinearProbes(NamedTuple):
    """``weight`` (R, D, C) and ``bias`` (R, C) of one classifier per rate."""

    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """(R, N, C) logits of features (N, D)."""
        return torch.einsum("nd,rdc->rnc", features, self.weight) + self.bias[:, None]


def train_linear_probes(
    features: Tensor,
    findings: Tensor,
    rates: Sequence[float] = RATES,
    steps: int = 12500,
    batch_size: int = 128,
    seed: int = 0,
) -> LinearProbes:
    """One linear classifier of all findings per rate, all trained at once (DINOv2's ``eval/linear.py``, with sigmoids).

    SGD with momentum 0.9, no weight decay, rates ``rate * batch_size / 256`` that fall by a cosine to 0; weights start normal
    with deviation 0.01. The gradient of the binary cross-entropy is written out.

    Args:
        features: (N, D), as the encoder gives them.
        findings: (N, C) 1, 0 or -1 for unknown, which does not count.
        rates: R.
        steps: officially 10 epochs of 1,250.
        batch_size: rows per step, drawn with replacement.
        seed: of the first weights and the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    rate = torch.tensor(rates)[:, None, None] * batch_size / REFERENCE_BATCH
    width, count = features.shape[1], findings.shape[1]
    weight = (0.01 * torch.randn(width, count, generator=generator)).repeat(len(rates), 1, 1)
    bias = torch.zeros(len(rates), count)
    probes, speeds = LinearProbes(weight, bias), LinearProbes(torch.zeros_like(weight), torch.zeros_like(bias))
    for step in range(steps):
        rows = torch.randint(len(features), (batch_size,), generator=generator)
        x, y = features[rows], findings[rows]
        known = y >= 0
        error = (probes.scores(x).sigmoid() - y.clamp_min(0)) * known / known.sum().clamp_min(1)
        current = 0.5 * (1 + math.cos(math.pi * step / steps)) * rate
        speeds.weight.mul_(MOMENTUM).add_(torch.einsum("nd,rnc->rdc", x, error))
        speeds.bias.mul_(MOMENTUM).add_(error.sum(dim=1))
        weight.sub_(current * speeds.weight)
        bias.sub_(current[:, 0] * speeds.bias)
    return probes
