"""Stage ``cross_validate``: blocks, merged and fused models and their baselines, each trained and judged in every fold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from hydra import compose

from experiments.config.overrides import creating, key_of
from experiments.evaluation import mm_lego as suites
from experiments.evaluation.base import TrainedSplit
from experiments.evaluation.mm_lego import CHANCE, Metrics, Rows
from experiments.figures import mm_lego as figures
from experiments.run import parts
from experiments.run.directory import Run, quoted, variant_of
from experiments.runner import run_stages
from experiments.stages import Facts, stage
from models.errors import UserError
from models.mm_lego.batch import CENSORED, TIME

log = logging.getLogger("run")
OF_THIS_RUN = {"stages", "resume", "checkpoint"}  # overrides that do not apply to the runs of a fold
COX = "cox"


@stage()
def cross_validate(
    run: Run,
    main: str = "merged",
    missing: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8),
    missing_draws: int = 2,
    bootstrap: int = 200,
    cox: bool = True,
    cost: Sequence[int] = (2, 4, 8, 16),
) -> Facts:
    """Judge every method on the test part of every fold, each on the same patients.

    ``cross_validation.block`` holds the overrides of the runs of single modalities. ``cross_validation.methods`` maps the name
    of each method that takes all modalities to ``{overrides, stages, start}``: stage ``merge`` takes the blocks of the fold,
    and ``start`` names a method whose weights it trains on from. Every run lies in ``compare/fold<k>/<method>`` of this one.

    Metrics are means over the folds. The 95 % interval of the first one is that of patients drawn with replacement within
    each test part, the same ones for all methods.

    Args:
        run: the run.
        main: the method whose metrics are those of this run; the others are columns beside it.
        missing: chances that a modality of a test patient is taken away.
        missing_draws: of which are.
        bootstrap: resamples of the test patients.
        cox: also fit Cox regressions, of survival; needs scikit-survival.
        cost: numbers of modalities for which time and memory are measured.
    """
    methods = run.cfg.cross_validation.methods
    if not methods.get(main):
        raise UserError(f"cross_validation.methods has no '{main}', whose metrics would be this run's; it has {[*methods]}.")
    data = parts.datamodule(run)
    names = [*data.cohort.modalities]
    judged: dict[str, list[Judged]] = {}
    for fold in range(1, data.folds + 1):
        log.info("fold %d of %d", fold, data.folds)
        for name, overrides in runs_of(run, names, fold).items():
            split = trained(run, f"fold{fold}/{name}", overrides)
            judged.setdefault(name, []).append(judge(split, missing, missing_draws))
            if name == main:
                of_main = split
        if cox and TIME in judged[main][-1].rows:
            rows = judged[main][-1].rows | {"risks": suites.cox_risks(of_main.data.splits, "test")}
            judged.setdefault(COX, []).append(Judged(rows, suites.score_risks, suites.score_risks(rows), {}))
    label = next(iter(judged[main][0].metrics))
    table = {name: summary(folds, label, bootstrap) for name, folds in judged.items()}
    table[main] |= over_best_block(judged, main, names, label, bootstrap)
    measured = suites.cost(of_main, cost) if cost else None
    for note in measured.notes if measured else ():
        run.note(note)
    run.note(f"CROSS-VALIDATED: means over {data.folds} folds; intervals of {bootstrap} draws of the test patients.")
    others = {name: named(row) for name, row in table.items() if name != main}
    facts: Facts = {"metrics": named(table[main]), "baselines": others}
    if label in CHANCE:
        facts["baselines"]["chance"] = {f"test/{label}": CHANCE[label]}
    facts["metrics"] |= named(measured.metrics) if measured else {}
    drawn = drawings(judged, table, main, label) | suites.latents(of_main).figures | (measured.figures if measured else {})
    facts["figures"] = {}
    for name, draw in drawn.items():
        facts["figures"][name] = draw(run.dir / "figures" / f"{name}.png").name
    return facts


class Judged(NamedTuple):
    """A method on the test part of a fold.

    Args:
        rows: predictions and truths.
        score: gives the first metric of any of these rows, by name.
        metrics: of all rows.
        missing: the first metric by the share of missing modalities.
    """

    rows: Rows
    score: Callable[[Rows], Metrics]
    metrics: Metrics
    missing: dict[float, float]


def runs_of(run: Run, names: Sequence[str], fold: int) -> dict[str, list[str]]:
    """Overrides of every run of a fold by method: single modalities first, then what is merged of them."""
    settings, folder = run.cfg.cross_validation, run.dir / "compare" / f"fold{fold}"
    runs = {name: [*settings.block, f"datamodule.modalities=[{name}]", "stages=[fit]"] for name in names}
    for name, method in settings.methods.items():
        if method is None:  # a recipe does without a method of the one it inherits
            continue
        stages = f"stages=[{','.join(method.stages)}]"
        runs[name] = [*method.overrides, stages, f"blocks.folder={quoted(folder)}"]
        if method.get("start"):
            runs[name].append(f"checkpoint={quoted(folder / method.start)}")
    return {name: [*overrides, f"datamodule.fold={fold}"] for name, overrides in runs.items()}


def trained(run: Run, name: str, overrides: Sequence[str]) -> TrainedSplit:
    """A variant of this run, trained or merged, and the test part of its fold."""
    combined = [override for override in run.overrides if key_of(override) not in OF_THIS_RUN] + creating(overrides)
    variant = variant_of(run, name, compose("config", overrides=combined), combined)
    run_stages(variant)
    variant.set_status("finished")
    return parts.trained_split(variant, "test")


@torch.inference_mode()
def judge(split: TrainedSplit, missing: Sequence[float], draws: int) -> Judged:
    """Metrics of a trained split, complete and with missing modalities."""
    rows = suites.with_risks(suites.rows_of(split))
    label, _ = suites.main_metric(split, rows)
    metrics = split.module.validation_metrics(rows)
    curve = {}
    for share in missing:
        values = [suites.main_metric(split, suites.rows_of(split, share, draw))[1] for draw in range(draws if share else 1)]
        curve[share] = sum(values) / len(values)
    return Judged(rows, suites.first_metric(split, rows), {label: metrics.pop(label)} | metrics, curve)


def summary(folds: Sequence[Judged], label: str, bootstrap: int) -> Metrics:
    """Means over the folds of the metrics that are defined in all of them; of the first one also its interval, standard
    deviation, and the values when modalities are missing."""
    defined = [name for name in folds[0].metrics if all(name in fold.metrics for fold in folds)]
    metrics = {name: float(np.mean([fold.metrics[name] for fold in folds])) for name in defined}
    metrics[f"{label}_std"] = float(np.std([fold.metrics[label] for fold in folds]))
    metrics |= suites.interval_of(label, resampled_means(folds, label, bootstrap))
    for share in folds[0].missing:
        value = float(np.mean([fold.missing[share] for fold in folds]))
        metrics[f"missing_{round(100 * share)}/{label}"] = value
    return metrics


def resampled_means(folds: Sequence[Judged], label: str, bootstrap: int) -> np.ndarray:
    """(bootstrap,) means over the folds of the metric of patients drawn within each fold; a seed draws the same ones for every
    method."""
    draws = [[fold.score(suites.resampled(fold.rows, seed)).get(label, np.nan) for fold in folds] for seed in range(bootstrap)]
    return np.nanmean(np.array(draws), axis=1)


def over_best_block(
    judged: Mapping[str, Sequence[Judged]], main: str, names: Sequence[str], label: str, bootstrap: int
) -> Metrics:
    """What the main method gains over the single modality with the best mean, and the interval of the difference."""
    means = {name: np.mean([fold.metrics[label] for fold in judged[name]]) for name in names}
    best = max(names, key=lambda name: means[name])
    gain = resampled_means(judged[main], label, bootstrap) - resampled_means(judged[best], label, bootstrap)
    name = f"{label}_over_{best}"
    return {name: float(np.mean([f.metrics[label] for f in judged[main]]) - means[best]), **suites.interval_of(name, gain)}


def named(metrics: Metrics) -> Metrics:
    return {f"test/{name}": value for name, value in metrics.items() if value == value}


def drawings(
    judged: Mapping[str, Sequence[Judged]], table: Mapping[str, Metrics], main: str, label: str
) -> dict[str, Callable]:
    """Functions that draw the figures of all folds, by name."""
    bounds = {name: (row[label], row[f"{label}_95_low"], row[f"{label}_95_high"]) for name, row in table.items()}
    drawn: dict[str, Callable] = {"methods": partial(figures.intervals, bounds, label, CHANCE.get(label, 0.0))}
    folds = judged[main]
    if folds[0].missing:
        series = {
            name: {100 * share: float(np.mean([fold.missing[share] for fold in of_method])) for share in folds[0].missing}
            for name, of_method in judged.items()
            if of_method[0].missing
        }
        labels = {"xlabel": "modalities missing, percent", "ylabel": label}
        drawn["missing"] = partial(figures.curves, series, labels=labels)
    if TIME in folds[0].rows:
        high = torch.cat([fold.rows["risks"] > fold.rows["risks"].median() for fold in folds])
        times, censored = (torch.cat([fold.rows[name] for fold in folds]) for name in (TIME, CENSORED))
        drawn["kaplan_meier"] = partial(figures.kaplan_meier_by_risk, times, censored, high)
    return drawn
