"""One table and one plot over the jobs of a sweep: a Hydra callback, for every sweep.

Jobs that differ in ``seed`` alone are repetitions: the table gives their mean and standard deviation. Written into the
sweep's directory: ``sweep.json`` (every job), ``sweep.csv`` (the table) and ``sweep_<metric>.png``. Where one override is
``paired``, a second table gives what it changes job by job.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

SEED = "seed"


class Job(NamedTuple):
    """What one finished job was given and what it found."""

    settings: dict[str, str]
    metrics: dict[str, float]


class SweepTable(Callback):
    """Prints the table when the last job is done.

    Args:
        metrics: which metrics of result.json; null: the one that ``optimize`` names, else the first four.
        x: the override along the plot's axis; null: the numeric one with the most values.
        paired: an override whose values are compared job by job: a second table, ``sweep_paired.csv``, gives the mean and
            standard deviation over seeds of the difference from its first value, all else and the seed being the same.
    """

    def __init__(self, metrics: Sequence[str] | None = None, x: str | None = None, paired: str | None = None):
        self.metrics, self.x, self.paired = list(metrics or []), x, paired

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        chosen = OmegaConf.select(config, "optimize")
        metrics = self.metrics or ([chosen] if chosen else [])
        summarise(folder, metrics, self.x)
        if self.paired:
            params = OmegaConf.select(config, "hydra.sweeper.params") or {}
            first = str(params.get(self.paired, "")).split(",")[0].strip() or None
            summarise_pairs(folder, metrics, self.paired, first)


def summarise_pairs(folder: Path, metrics: Sequence[str], paired: str, first: str | None = None) -> list[dict[str, Any]]:
    """Write and print what each value of the override ``paired`` changes against ``first`` (null: the first in order).

    Jobs that agree in every other override, the seed included, are a pair; of their differences the rows give mean and
    standard deviation.
    """
    jobs = [job for job in read_jobs(folder) if paired in job.settings]
    metrics = [m for m in metrics if any(m in job.metrics for job in jobs)]
    if not jobs or not metrics:
        return []
    first = first or min(job.settings[paired] for job in jobs)

    def others(job: Job) -> tuple[tuple[str, str], ...]:
        return tuple(sorted((key, value) for key, value in job.settings.items() if key != paired))

    base = {others(job): job for job in jobs if job.settings[paired] == first}
    changed = []
    for job in jobs:
        if job.settings[paired] != first and (of := base.get(others(job))) is not None:
            found = {m: job.metrics[m] - of.metrics[m] for m in metrics if m in job.metrics and m in of.metrics}
            changed.append(Job(job.settings, found))
    if not changed:
        return []
    axes = sorted({key for job in changed for key in job.settings if key != SEED})
    rows = _rows(changed, axes, metrics)
    _write(folder / "sweep_paired.csv", rows, axes, metrics)
    _print(
        f"{folder.name}: change against {paired}={first}, job by job  (mean ± standard deviation over seeds)",
        rows,
        axes,
        metrics,
        "+",
    )
    return rows


def summarise(folder: Path, metrics: Sequence[str] = (), x: str | None = None) -> list[dict[str, Any]]:
    """Write and print the table of the finished jobs below ``folder``; returns its rows. Nothing where none is finished."""
    jobs = read_jobs(folder)
    if not jobs:
        return []
    metrics = [m for m in metrics if any(m in job.metrics for job in jobs)] or list(jobs[0].metrics)[:4]
    axes = sorted({key for job in jobs for key in job.settings if key != SEED})
    rows = _rows(jobs, axes, metrics)
    (folder / "sweep.json").write_text(json.dumps([job._asdict() for job in jobs], indent=1))
    _write(folder / "sweep.csv", rows, axes, metrics)
    _print(f"{folder.name}  (mean ± standard deviation over seeds)", rows, axes, metrics)
    print(f"table, plots and every job: {folder}")
    x = x if x in axes else _numeric_axis(jobs, axes)
    if x is not None:
        for metric in metrics:
            _plot(rows, axes, x, metric, folder / f"sweep_{metric.replace('/', '_')}.png")
    return rows


def read_jobs(folder: Path) -> list[Job]:
    """The finished jobs with the settings in which they differ."""
    found = []
    for file in sorted(folder.glob("*/result.json")):
        record = json.loads((file.parent / "run.json").read_text())
        if record["status"] == "finished":
            found.append(Job(_settings(record["overrides"]), json.loads(file.read_text())["metrics"]))
    keys = {key for job in found for key in job.settings}
    same = {key for key in keys if len({job.settings.get(key) for job in found}) == 1}
    return [Job({k: v for k, v in job.settings.items() if k not in same}, job.metrics) for job in found]


def _settings(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def _rows(jobs: list[Job], axes: list[str], metrics: list[str]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.settings.get(axis, "") for axis in axes), []).append(job)
    rows = []
    for key, members in sorted(groups.items(), key=lambda item: [_sortable(value) for value in item[0]]):
        row: dict[str, Any] = dict(zip(axes, key, strict=True)) | {"jobs": len(members)}
        for metric in metrics:
            values = [job.metrics[metric] for job in members if metric in job.metrics]
            row[f"{metric} mean"] = statistics.fmean(values) if values else math.nan
            row[f"{metric} std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        rows.append(row)
    return rows


def _sortable(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def _numeric_axis(jobs: list[Job], axes: list[str]) -> str | None:
    values = {axis: {job.settings.get(axis, "") for job in jobs} for axis in axes}
    numeric = [axis for axis in axes if len(values[axis]) > 1 and all(_sortable(v)[0] == 0 for v in values[axis])]
    return max(numeric, key=lambda axis: len(values[axis]), default=None)


def _write(path: Path, rows: list[dict[str, Any]], axes: list[str], metrics: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*axes, "jobs", *(f"{m} {what}" for m in metrics for what in ("mean", "std"))])
        writer.writeheader()
        writer.writerows(rows)


def _print(title: str, rows: list[dict[str, Any]], axes: list[str], metrics: list[str], sign: str = "") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in (*axes, "jobs", *metrics):
        table.add_column(column, justify="left" if column in axes else "right")
    for row in rows:
        cells = [f"{row[f'{m} mean']:{sign}.2f}" + _spread(row[f"{m} std"]) for m in metrics]
        table.add_row(*(row[axis] for axis in axes), str(row["jobs"]), *cells)
    Console(width=None if Console().is_terminal else 180).print(table)


def _spread(deviation: float) -> str:
    return "" if math.isnan(deviation) else f" ± {deviation:.2f}"


def _plot(rows: list[dict[str, Any]], axes: list[str], x: str, metric: str, path: Path) -> None:
    """A curve for each setting of the other axes, with the spread over seeds."""
    from experiments.figures.canvas import _pyplot, _save

    others = [axis for axis in axes if axis != x]
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        label = ", ".join(f"{axis}={row[axis]}" for axis in others) or metric
        curves.setdefault(label, []).append((float(row[x]), row[f"{metric} mean"], row[f"{metric} std"]))
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for label, points in curves.items():
        at, mean, spread = zip(*sorted(points), strict=True)
        axis.errorbar(at, mean, [0 if math.isnan(s) else s for s in spread], label=label, marker=".", capsize=3, linewidth=1.4)
    values = [point[0] for points in curves.values() for point in points]
    if min(values) > 0 and max(values) / min(values) >= 8:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    axis.set(xlabel=x, ylabel=metric)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    _save(plt, figure, path)
