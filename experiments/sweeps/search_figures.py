"""Figures of a search: how its best value grew, and which overrides mattered."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from experiments.figures import canvas


def draw(study: Any, metrics: list[str], folder: Path) -> None:
    """Write ``search_history.png`` and, with enough trials, ``search_importance.png``.

    Args:
        study: Optuna's study with at least one complete trial.
        metrics: names of its objectives.
        folder: where the figures go.
    """
    import optuna

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    figure, (axes,) = canvas.figure(1, len(metrics), figsize=(5.2 * len(metrics), 3.6))
    for number, (metric, axis) in enumerate(zip(metrics, axes, strict=True)):
        values = [trial.values[number] for trial in complete]
        better = max if _is_maximised(study, number) else min
        best = [better(values[: position + 1]) for position in range(len(values))]
        axis.plot([trial.number for trial in complete], values, ".", label="trial")
        axis.plot([trial.number for trial in complete], best, linewidth=1.4, label="best so far")
        axis.set(xlabel="trial", ylabel=metric)
        axis.legend(frameon=False)
    canvas.save(figure, folder / "search_history.png")
    if len(complete) < 4 or len(complete[0].params) < 2:
        return
    figure, (axes,) = canvas.figure(1, len(metrics), figsize=(5.2 * len(metrics), 1.2 + 0.4 * len(complete[0].params)))
    for number, (metric, axis) in enumerate(zip(metrics, axes, strict=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            sign = -1 if _is_maximised(study, number) else 1  # the evaluator asks what makes a value small
            try:
                shares = optuna.importance.get_param_importances(
                    study, evaluator=evaluator, target=partial(_value, number=number, sign=sign)
                )
            except (ValueError, RuntimeError):  # all values are equal
                continue
        names = list(shares)[::-1]
        axis.barh(names, [shares[name] for name in names])
        axis.set(xlabel=f"importance for {metric} (PED-ANOVA)")
    canvas.save(figure, folder / "search_importance.png")


def _is_maximised(study: Any, number: int) -> bool:
    return study.directions[number].name == "MAXIMIZE"


def _value(trial: Any, number: int, sign: int) -> float:
    return sign * trial.values[number]
