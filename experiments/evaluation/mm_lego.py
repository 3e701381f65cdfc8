"""Outcomes of patients: held-out metrics with intervals, what Cox regression reaches, missing modalities, and cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.order import BatchRequest
from datamodules.patients import Patients
from datamodules.readers.cohorts import Arrays
from experiments.benchmarks.measure import seconds
from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.figures import mm_lego as figures
from lightning_modules.held_out import check_weights, join_rows, on_cpu
from models.batch import INDEX
from models.errors import UserError
from models.mm_lego.batch import CENSORED, PRESENT, TIME, modality_key
from models.mm_lego.block import LegoBlock
from models.mm_lego.merge import LegoMerge, merge_latents
from models.mm_lego.metrics import concordance, log_rank_p
from models.mm_lego.survival import risk

Rows = dict[str, Tensor]
Metrics = dict[str, float]
PENALTIES = (1.0, 10.0, 100.0, 1000.0)  # of Cox regression
STEP = 1e-2  # by which a latent is scaled to see what it moves
CHANCE = {"survival/c_index": 50.0, "survival/auc": 50.0, "class/auc": 50.0, "class/hard_auc": 50.0, "labels/auc": 50.0}


# ---- suites --------------------------------------------------------------------------------------------------------


def outcomes(split: TrainedSplit, bootstrap: int = 200, cox: bool = True, seed: int = 0) -> SuiteResult:
    """Metrics of the split with 95 % intervals, beside chance and, for survival, Cox regression on the same modalities.

    Args:
        split: the trained module and its data.
        bootstrap: resamples of the patients for the intervals; 0: none.
        cox: fit the Cox regression, which needs scikit-survival.
        seed: of the resamples.
    """
    rows = with_risks(split.rows("logits"))
    metrics = split.module.validation_metrics(rows)
    baselines = {"chance": {name: value for name, value in CHANCE.items() if name in metrics}}
    if bootstrap and metrics:
        score, main = first_metric(split, rows), next(iter(metrics))
        metrics |= interval_of(main, [score(resampled(rows, seed + i)).get(main, float("nan")) for i in range(bootstrap)])
    drawn: dict[str, Any] = {}
    if TIME in rows:
        high = rows["risks"] > rows["risks"].median()
        metrics["survival/log_rank_p"] = log_rank_p(rows[TIME].double(), rows[CENSORED], high)
        drawn["kaplan_meier"] = partial(figures.kaplan_meier_by_risk, rows[TIME], rows[CENSORED], high)
        if cox:
            baselines["cox"] = score_risks(rows | {"risks": cox_risks(split.data.splits, split.name)})
    metrics = {name: value for name, value in metrics.items() if value == value}
    return SuiteResult(metrics, baselines, dict(split.hashes), figures=drawn)


def missing(split: TrainedSplit, shares: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8), draws: int = 3) -> SuiteResult:
    """The first metric of the split when modalities are missing at random, ``missing_<percent>/...``; mean over draws.

    Args:
        split: the trained module and its data.
        shares: chances that a modality of a patient is taken away; one always stays.
        draws: of which modalities are missing.
    """
    curve = {share: _mean([main_metric(split, rows_of(split, share, draw)) for draw in range(draws)]) for share in shares}
    metrics = {f"missing_{round(100 * share)}/{name}": value for share, (name, value) in curve.items()}
    name = next(iter(curve.values()))[0]
    draw = partial(figures.curves, {"this run": {100 * share: value for share, (_, value) in curve.items()}})
    labels = {"xlabel": "modalities missing, percent", "ylabel": name}
    return SuiteResult(metrics, hashes=dict(split.hashes), figures={"missing": partial(draw, labels=labels)})


@torch.no_grad()
def latents(split: TrainedSplit) -> SuiteResult:
    """Figures of merged blocks: each latent in the frequency domain, and how much each modality moves the merged one."""
    network = split.module.model
    if not isinstance(network, LegoMerge):
        return SuiteResult(notes=["Latents left out: this model does not merge blocks."])
    names = [*split.module.shapes]
    batch = next(iter(split.batches()))
    whole = batch[PRESENT].all(dim=1)
    if not bool(whole.any()):
        return SuiteResult(notes=["Latents left out: no patient of the first batch has all modalities."])
    inputs = [batch[modality_key(name)][whole] for name in names]
    parts = torch.stack([block.encode(x) for block, x in zip(network.blocks, inputs, strict=True)])
    weights = influence(network, parts)
    spectra = {name: part.abs().mean(dim=0).cpu() for name, part in zip(names, parts, strict=True)}
    spectra["merged"] = _merged(network, parts).abs().mean(dim=0).cpu()
    metrics = {f"influence/{name}": 100 * value for name, value in zip(names, weights, strict=True)}
    drawn = {
        "latents": partial(figures.spectra, spectra),
        "merge_weights": partial(figures.bars, dict(zip(names, (100 * w for w in weights), strict=True)), "influence, percent"),
    }
    return SuiteResult(metrics, hashes=dict(split.hashes), figures=drawn)


def cost(
    split: TrainedSplit, counts: Sequence[int] = (2, 4, 8, 16), width: int = 64, batch_size: int = 64, rounds: int = 5
) -> SuiteResult:
    """Parameters, time and memory of merged blocks of this run's sizes over the number of modalities, tables of random numbers.

    Args:
        split: its module gives the sizes of the blocks.
        counts: numbers of modalities.
        width: of each table.
        batch_size: patients.
        rounds: training steps that are timed; the median counts.
    """
    block: LegoBlock = split.module.model.blocks[0]
    table = {count: cost_of(block, count, width, batch_size, rounds) for count in counts}
    metrics = {f"cost/{count}_modalities/{name}": value for count, row in table.items() for name, value in row.items()}
    drawn = {"cost": partial(figures.cost, table)}
    return SuiteResult(metrics, notes=["Times of the suite cost depend on the machine and its load."], figures=drawn)


# ---- parts that cross-validation uses, too --------------------------------------------------------------------------


def rows_of(split: TrainedSplit, share: float | None = None, draw: int = 0) -> Rows:
    """Predictions and truths of a split, with a ``share`` of its modalities missing where one is given."""
    check_weights(split.module)
    options = {} if share is None else {"missing": share, "draw": draw}
    return join_rows([on_cpu(split.module.predict_step(batch)) for batch in split.batches(**options)])


def with_risks(rows: Rows) -> Rows:
    """The rows, of survival with "risks" (N,)."""
    return rows | {"risks": risk(rows["logits"].double())} if TIME in rows else rows


def first_metric(split: TrainedSplit, rows: Rows) -> Callable[[Rows], Metrics]:
    """The function that gives the first metric of the module's task, and no slower ones beside it."""
    return score_risks if TIME in rows else split.module.validation_metrics


def main_metric(split: TrainedSplit, rows: Rows) -> tuple[str, float]:
    """The first metric of the module's task. Raises UserError where it is not defined on these rows."""
    metrics = first_metric(split, rows)(with_risks(rows))
    name, value = next(iter(metrics.items()), ("", float("nan")))
    if value != value:
        raise UserError(f"the split {split.name} is too small for a metric: take fewer folds or more patients.")
    return name, value


def resampled(rows: Rows, seed: int) -> Rows:
    """As many rows, drawn with replacement."""
    count = len(rows[INDEX])
    drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))
    return {name: values[drawn] for name, values in rows.items()}


def interval_of(name: str, values: Sequence[float] | np.ndarray) -> Metrics:
    """The percentile interval of resampled values; those that are not defined are left out."""
    low, high = np.nanpercentile(np.asarray(values), [2.5, 97.5])
    return {f"{name}_95_low": float(low), f"{name}_95_high": float(high)}


def cox_risks(splits: dict[str, Patients], name: str) -> Tensor:
    """Risks (N,) of a split by Cox regression with a ridge penalty on all columns; a sequence enters by its mean.

    The penalty is the one with the best c-index on val, or on the training patients where there is no val.

    Raises UserError where scikit-survival is missing.
    """
    try:
        from sksurv.linear_model import CoxPHSurvivalAnalysis
    except ImportError as error:
        raise UserError("the Cox regression needs scikit-survival: pip install it, or set the suite's cox=false.") from error
    chosen = splits.get("val", splits["train"])
    x, truth = columns_of(splits["train"]), splits["train"].truth
    outcome = np.array(
        [*zip((~truth[CENSORED]).tolist(), truth[TIME].tolist(), strict=True)], dtype=[("event", bool), ("time", float)]
    )
    best: tuple[float, Any] | None = None
    for penalty in PENALTIES:
        model = CoxPHSurvivalAnalysis(alpha=penalty, n_iter=50).fit(x, outcome)
        risks = torch.from_numpy(model.predict(columns_of(chosen)))
        c_index = concordance(risks, chosen.truth[TIME], chosen.truth[CENSORED]).c_index
        if best is None or c_index > best[0]:
            best = (c_index, model)
    return torch.from_numpy(best[1].predict(columns_of(splits[name])))


def columns_of(dataset: Patients) -> np.ndarray:
    """(n, W) all modalities side by side, averaged over their rows; zeros where one is missing."""
    request, columns = BatchRequest(np.arange(len(dataset)), 0, 0), []
    batch: dict[str, Any] = {}
    if not all(isinstance(modality, Arrays) for modality in dataset.cohort.modalities.values()):
        batch = dataset.batch(request)
    for position, (name, modality) in enumerate(dataset.cohort.modalities.items()):
        values = modality.values[dataset.rows] if isinstance(modality, Arrays) else batch[modality_key(name)].numpy()
        columns.append(values.mean(axis=1) * dataset.present[:, position, None])
    return np.concatenate(columns, axis=1).astype(np.float64)


def score_risks(rows: Rows) -> Metrics:
    """The c-index of "risks", in percent."""
    return {"survival/c_index": 100 * concordance(rows["risks"], rows[TIME], rows[CENSORED]).c_index}


def influence(network: LegoMerge, parts: Tensor) -> list[float]:
    """Shares with sum 1: how much the merged latent changes when the latent of one modality grows by a hundredth."""
    base = _merged(network, parts)
    moved = []
    for position in range(len(parts)):
        scaled = parts.clone()
        scaled[position] *= 1 + STEP
        moved.append(float((_merged(network, scaled) - base).abs().mean()))
    return [value / max(sum(moved), 1e-30) for value in moved]


def _merged(network: LegoMerge, parts: Tensor) -> Tensor:
    options = (network.phase, network.official_constant, network.density)
    return merge_latents(parts, network.method, network.weights, None, *options)


def cost_of(block: LegoBlock, count: int, width: int, batch_size: int, rounds: int) -> Metrics:
    """Thousand parameters, milliseconds of a training step, and megabytes that its forward pass keeps for the gradients."""
    tokens, dim = block.latent.shape
    step = block.steps[0].cross_attention
    sizes: dict[str, Any] = {"latent_tokens": tokens, "latent_dim": dim, "depth": block.depth, "heads": step.heads}
    sizes["dim_head"] = step.to_q.out_features // step.heads
    make: Callable[[], LegoBlock] = partial(LegoBlock, width, block.head.linear.out_features, **sizes)
    device = block.latent.device
    with torch.inference_mode(False), torch.enable_grad():
        network: nn.Module = LegoMerge([make() for _ in range(count)]).to(device)
        inputs = [torch.randn(batch_size, 1, width, device=device) for _ in range(count)]
        kept: list[int] = []

        def note(x: Tensor) -> Tensor:
            kept.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            network(inputs).square().sum().backward()
        timed = [seconds(lambda: network(inputs).square().sum().backward(), device) for _ in range(rounds)]
    return {
        "parameters_k": sum(p.numel() for p in network.parameters()) / 1e3,
        "step_ms": 1e3 * statistics.median(timed),
        "kept_mb": sum(kept) / 2**20,
    }


def _mean(values: Sequence[tuple[str, float]]) -> tuple[str, float]:
    return values[0][0], sum(value for _, value in values) / len(values)
