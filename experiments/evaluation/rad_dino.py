"""Probes of a self-supervised image encoder on frozen features, beside an encoder that was not trained.

k-NN and linear probes of findings, linear ones of sex, view and age.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.figures import rad_dino as drawing
from models.batch import IMAGE, INDEX
from models.errors import UserError
from models.metrics.multi_label import auroc, bootstrap_interval, tied_average_precision
from models.rad_dino.backbone import DinoViT
from models.rad_dino.batch import FINDINGS, METADATA
from models.rad_dino.probing import (
    NEIGHBOURS,
    RATES,
    LinearProbes,
    fit_ridge,
    known_metrics,
    neighbour_scores,
    probe_features,
    train_linear_probes,
)

BINARY = ("sex", "view")  # the columns of METADATA before the age
AGE = 2
PENALTIES = (1e-4, 1e-2, 1.0)
RANDOM = "random encoder"


class Cached(NamedTuple):
    """Frozen features (N, D) of a split by variant, with the truths and the rows (N,) of the split, on the CPU."""

    features: dict[str, Tensor]
    findings: Tensor
    metadata: Tensor
    row_numbers: Tensor

    def rows(self, rows: Tensor | slice) -> Cached:
        features = {name: values[rows] for name, values in self.features.items()}
        return Cached(features, self.findings[rows], self.metadata[rows], self.row_numbers[rows])

    @property
    def binary(self) -> Tensor:
        """(N, 2) sex and view: 1, 0, or -1 for unknown."""
        return self.metadata[:, : len(BINARY)].nan_to_num(-1).long()


class Splits(NamedTuple):
    """What probes are fitted on, chosen on and judged on; ``where`` they are chosen in words."""

    fit: Cached
    choose: Cached
    test: Cached
    train: Cached
    where: str


class Grid(NamedTuple):
    """How linear probes are trained, see :func:`~models.rad_dino.probing.train_linear_probes`."""

    rates: Sequence[float]
    steps: int
    seed: int


class Probe(NamedTuple):
    """The linear probe that was chosen: variant of the features, rate, and one classifier."""

    variant: str
    rate: float
    classifier: LinearProbes

    def scores(self, cached: Cached) -> Tensor:
        return self.classifier.scores(cached.features[self.variant])[0]


def probes(
    split: TrainedSplit,
    steps: int = 12500,
    rates: Sequence[float] = RATES,
    blocks: Sequence[int] = (1, 4),
    k: int = NEIGHBOURS,
    label_counts: Sequence[int] = (),
    bootstrap: int = 200,
    untrained: bool = True,
    seed: int = 0,
) -> SuiteResult:
    """AUROC and average precision (AUPRC) per finding and their means, in percent, of probes trained on the split train.

    Sex and view are probed in the same way; the age by ridge regression, judged by the mean error in years. Rate, number of
    blocks and use of patches of a linear probe are those with the best mean AUROC on the split val, or on the last fifth of
    train where there is no val.

    Args:
        split: the trained module and its data.
        steps, rates: see :func:`~models.rad_dino.probing.train_linear_probes`.
        blocks: see :func:`~models.rad_dino.probing.probe_features`.
        k: neighbours.
        label_counts: also probe the findings with the labels of so few images: ``linear/auroc@<count>``.
        bootstrap: resamples of the intervals of the means; 0: none.
        untrained: also probe the same network with random weights.
        seed: of the probes and of the random network.
    """
    if not split.data.label_names and bool(split.dataset.metadata.isnan().all()):
        return SuiteResult(notes=["Probes left out: the data has neither findings nor metadata."])
    encoders = {"this run": split.module.encoder}
    if untrained:
        encoders[RANDOM] = reset(split.module.encoder, seed)
    columns, notes, grid = {}, [], Grid(rates, steps, seed)
    for name, encoder in encoders.items():
        splits = _splits(encoder, split, blocks)
        columns[name] = _metadata(splits, grid)
        if split.data.label_names:
            metrics, note = _findings(splits, split, grid, k, label_counts, bootstrap)
            columns[name] = metrics | columns[name]
            notes += [note] if encoder is split.module.encoder else []
    metrics = columns.pop("this run")
    columns["chance"] = _chance(split, metrics)
    figures = {}
    if label_counts:
        figures["labels"] = partial(drawing.learning_curves, {"this run": metrics, **columns})
    return SuiteResult(metrics, columns, dict(split.hashes), notes, figures)


def reset(encoder: DinoViT, seed: int) -> DinoViT:
    """A network of the same sizes with the weights of a fresh one."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    fresh = copy.deepcopy(encoder)
    fresh.reset()
    torch.set_rng_state(state)
    return fresh


def _splits(encoder: DinoViT, split: TrainedSplit, blocks: Sequence[int]) -> Splits:
    train, test = _features(encoder, split, "train", blocks), _features(encoder, split, split.name, blocks)
    if "val" in split.data.splits and split.name != "val":
        return Splits(train, _features(encoder, split, "val", blocks), test, train, "val")
    cut = len(train.findings) * 4 // 5
    return Splits(train.rows(slice(cut)), train.rows(slice(cut, None)), test, train, "the last fifth of train")


def _findings(
    splits: Splits, split: TrainedSplit, grid: Grid, k: int, label_counts: Sequence[int], bootstrap: int
) -> tuple[dict[str, float], str]:
    names = split.data.label_names
    probe = _chosen(splits.fit.features, splits.fit.findings, splits.choose, splits.choose.findings, grid)
    if probe is None:
        raise UserError(f"no finding has both positives and negatives in {splits.where}: the probes cannot be chosen.")
    token = next((name for name in splits.train.features if name == "1_cls"), probe.variant)
    neighbours = neighbour_scores(splits.train.features[token], splits.train.findings, splits.test.features[token], k)
    linear = probe.scores(splits.test)
    metrics: dict[str, float] = {}
    for kind, scores in {"linear": linear, "knn": neighbours}.items():
        for metric, values in zip(("auroc", "auprc"), known_metrics(scores, splits.test.findings), strict=True):
            metrics[f"{kind}/{metric}"] = float(values.nanmean())
            metrics |= {f"{kind}/{metric}/{n}": float(v) for n, v in zip(names, values, strict=True) if v == v}
    for count in label_counts:
        few = splits.train.rows(torch.isin(splits.train.row_numbers, torch.from_numpy(split.data.first_rows(count))))
        features = {probe.variant: few.features[probe.variant]}
        small = _chosen(features, few.findings, splits.choose, splits.choose.findings, grid)
        if small is not None:
            values = known_metrics(small.scores(splits.test), splits.test.findings)[0]
            metrics[f"linear/auroc@{count}"] = float(values.nanmean())
    if bootstrap:
        complete = (splits.test.findings >= 0).all(dim=1)
        positives = splits.test.findings[complete] == 1
        for metric, function in (("auroc", auroc), ("auprc", tied_average_precision)):
            low, high = bootstrap_interval(function, linear[complete], positives, bootstrap, seed=grid.seed)
            metrics |= {f"linear/{metric}_95_low": 100 * low, f"linear/{metric}_95_high": 100 * high}
    return metrics, f"Linear probe: rate {probe.rate:g}, features {probe.variant}, chosen on {splits.where}."


def _metadata(splits: Splits, grid: Grid) -> dict[str, float]:
    """AUROC of sex and view in percent, and the mean error of the age in years, as far as the set knows them."""
    metrics: dict[str, float] = {}
    probe = _chosen(splits.fit.features, splits.fit.binary, splits.choose, splits.choose.binary, grid)
    if probe is not None:
        values = known_metrics(probe.scores(splits.test), splits.test.binary)[0]
        metrics |= {f"metadata/auroc/{name}": float(v) for name, v in zip(BINARY, values, strict=True) if v == v}
    fit_age, chosen_age, test_age = (cached.metadata[:, AGE] for cached in (splits.fit, splits.choose, splits.test))
    if all(bool((~age.isnan()).any()) for age in (fit_age, chosen_age, test_age)):
        errors = {}
        for variant, features in splits.fit.features.items():
            for penalty in PENALTIES:
                fitted = fit_ridge(features, fit_age, penalty)
                error = (fitted(splits.choose.features[variant]) - chosen_age).abs().nanmean()
                errors[float(error)] = (fitted(splits.test.features[variant]) - test_age).abs().nanmean()
        metrics["metadata/age_error_years"] = float(errors[min(errors)])
    return metrics


def _chosen(
    features: Mapping[str, Tensor], labels: Tensor, chosen_on: Cached, chosen_labels: Tensor, grid: Grid
) -> Probe | None:
    """The probe with the best mean AUROC on ``chosen_on``; None where no label has both values there."""
    best: tuple[float, Probe] | None = None
    for variant, values in features.items():
        trained = train_linear_probes(values, labels, grid.rates, grid.steps, seed=grid.seed)
        for number, scores in enumerate(trained.scores(chosen_on.features[variant])):
            area = float(known_metrics(scores, chosen_labels)[0].nanmean())
            if area == area and (best is None or area > best[0]):
                only = LinearProbes(*(part[number : number + 1] for part in trained))
                best = area, Probe(variant, grid.rates[number], only)
    return None if best is None else best[1]


def _chance(split: TrainedSplit, metrics: Mapping[str, float]) -> dict[str, float]:
    """What scores that know nothing reach: 50 % AUROC, a finding's share as AUPRC, the error of the median age."""
    findings, age = split.dataset.findings, split.dataset.metadata[:, AGE]
    known = (findings >= 0).sum(dim=0)
    share = 100 * (findings == 1).sum(dim=0) / known.clamp_min(1)
    chance = dict.fromkeys((name for name in metrics if "auroc" in name and "_95_" not in name), 50.0)
    for kind in ("linear", "knn"):
        chance |= {f"{kind}/auprc/{name}": float(value) for name, value in zip(split.data.label_names, share, strict=True)}
        occurring = [value for name, value in chance.items() if name.startswith(f"{kind}/auprc/") and name in metrics]
        chance[f"{kind}/auprc"] = sum(occurring) / max(len(occurring), 1)
    chance["metadata/age_error_years"] = float((age - split.data.splits["train"].metadata[:, AGE].nanmedian()).abs().nanmean())
    return {name: value for name, value in chance.items() if name in metrics}


def _features(encoder: DinoViT, split: TrainedSplit, name: str, blocks: Sequence[int]) -> Cached:
    """Frozen features and truths of a split."""
    part = TrainedSplit(split.module, split.data, name)
    features: dict[str, list[Tensor]] = {}
    truths: dict[str, list[Tensor]] = {FINDINGS: [], METADATA: [], INDEX: []}
    for batch in part.batches(crops=False):
        for variant, values in probe_features(encoder, batch[IMAGE], blocks).items():
            features.setdefault(variant, []).append(values.cpu())
        for key, parts in truths.items():
            parts.append(batch[key].cpu())
    return Cached(
        {variant: torch.cat(values) for variant, values in features.items()},
        *(torch.cat(parts) for parts in truths.values()),
    )
