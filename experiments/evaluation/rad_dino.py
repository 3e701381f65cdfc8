"""Probes of a self-supervised image encoder on frozen features: k-NN and linear, beside an encoder that was not trained so."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.evaluation.base import SuiteResult, TrainedSplit
from models.batch import IMAGE
from models.errors import UserError
from models.metrics.multi_label import auroc, bootstrap_interval, tied_average_precision
from models.rad_dino.backbone import DinoViT
from models.rad_dino.batch import FINDINGS
from models.rad_dino.probing import (
    NEIGHBOURS,
    RATES,
    known_metrics,
    neighbour_scores,
    probe_features,
    train_linear_probes,
)

Cached = tuple[dict[str, Tensor], Tensor]  # features by variant, findings


def probes(
    split: TrainedSplit,
    steps: int = 12500,
    rates: Sequence[float] = RATES,
    blocks: Sequence[int] = (1, 4),
    k: int = NEIGHBOURS,
    bootstrap: int = 200,
    untrained: bool = True,
    seed: int = 0,
) -> SuiteResult:
    """AUROC and average precision (AUPRC) per finding and their means, in percent, of probes trained on the split train.

    The linear probe's rate, number of blocks and use of patches are those with the best mean AUROC on the split val, or on the
    last fifth of train where there is no val.

    Args:
        split: the trained module and its data.
        steps, rates: see :func:`~models.rad_dino.probing.train_linear_probes`.
        blocks: see :func:`~models.rad_dino.probing.probe_features`.
        k: neighbours.
        bootstrap: resamples of the interval of the mean AUROC; 0: none.
        untrained: also probe the same network with random weights.
        seed: of the probes and of the random network.
    """
    if not split.data.label_names:
        return SuiteResult(notes=["Probes left out: the data has no findings."])
    options = (steps, rates, blocks, k, bootstrap, seed)
    metrics, note = _probed(split.module.encoder, split, *options)
    baselines = {}
    if untrained:
        baselines["random encoder"] = _probed(_reset(split.module.encoder, seed), split, *options)[0]
    findings = split.dataset.findings
    known = (findings >= 0).sum(dim=0)
    share = 100 * (findings == 1).sum(dim=0) / known.clamp_min(1)
    chance = dict.fromkeys((name for name in metrics if "auroc" in name and "_9" not in name), 50.0)
    for probe in ("linear", "knn"):
        chance |= {f"{probe}/auprc/{name}": float(value) for name, value in zip(split.data.label_names, share, strict=True)}
        occurring = [value for name, value in chance.items() if name.startswith(f"{probe}/auprc/") and name in metrics]
        chance[f"{probe}/auprc"] = sum(occurring) / max(len(occurring), 1)
    baselines["chance"] = {name: value for name, value in chance.items() if name in metrics}
    return SuiteResult(metrics, baselines, dict(split.hashes), [note])


def _reset(encoder: DinoViT, seed: int) -> DinoViT:
    """A network of the same sizes with the weights of a fresh one."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    fresh = copy.deepcopy(encoder)
    fresh.reset()
    torch.set_rng_state(state)
    return fresh


def _probed(
    encoder: DinoViT,
    split: TrainedSplit,
    steps: int,
    rates: Sequence[float],
    blocks: Sequence[int],
    k: int,
    bootstrap: int,
    seed: int,
) -> tuple[dict[str, float], str]:
    train, test = _features(encoder, split, "train", blocks), _features(encoder, split, split.name, blocks)
    if "val" in split.data.splits and split.name != "val":
        fit, chosen_on, where = train, _features(encoder, split, "val", blocks), "val"
    else:
        cut = len(train[1]) * 4 // 5
        fit, chosen_on = (({n: x[s] for n, x in train[0].items()}, train[1][s]) for s in (slice(cut), slice(cut, None)))
        where = "the last fifth of train"
    best = None
    for variant, features in fit[0].items():
        trained = train_linear_probes(features, fit[1], rates, steps, seed=seed)
        for rate, scores in zip(rates, trained.scores(chosen_on[0][variant]), strict=True):
            area = float(known_metrics(scores, chosen_on[1])[0].nanmean())
            if best is None or area > best[0]:
                best = (area, variant, rate, trained, rates.index(rate))
    if best is None or best[0] != best[0]:
        raise UserError(f"no finding has both positives and negatives in {where}: the probes cannot be chosen.")
    _, variant, rate, trained, index = best
    names = split.data.label_names
    metrics = {}
    class_token = "1_cls" if "1_cls" in train[0] else variant
    all_scores = {
        "linear": trained.scores(test[0][variant])[index],
        "knn": neighbour_scores(train[0][class_token], train[1], test[0][class_token], k),
    }
    for probe, scores in all_scores.items():
        for metric, values in zip(("auroc", "auprc"), known_metrics(scores, test[1]), strict=True):
            metrics[f"{probe}/{metric}"] = float(values.nanmean())
            metrics |= {f"{probe}/{metric}/{n}": float(v) for n, v in zip(names, values, strict=True) if v == v}
    if bootstrap:
        complete = (test[1] >= 0).all(dim=1)
        for metric, function in (("auroc", auroc), ("auprc", tied_average_precision)):
            scores, positives = all_scores["linear"][complete], test[1][complete] == 1
            low, high = bootstrap_interval(function, scores, positives, bootstrap, seed=seed)
            metrics |= {f"linear/{metric}_95_low": 100 * low, f"linear/{metric}_95_high": 100 * high}
    return metrics, f"Linear probe: rate {rate:g}, features {variant}, chosen on {where}."


def _features(encoder: DinoViT, split: TrainedSplit, name: str, blocks: Sequence[int]) -> Cached:
    """Frozen features and findings of a split, on the CPU."""
    part = TrainedSplit(split.module, split.data, name)
    features: dict[str, list[Tensor]] = {}
    findings = []
    for batch in part.batches(crops=False):
        for variant, values in probe_features(encoder, batch[IMAGE], blocks).items():
            features.setdefault(variant, []).append(values.cpu())
        findings.append(batch[FINDINGS].cpu())
    return {variant: torch.cat(values) for variant, values in features.items()}, torch.cat(findings)
