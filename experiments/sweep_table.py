"""One table and one plot over the jobs of a sweep: a Hydra callback, for every sweep.

Jobs that differ in ``seed`` alone are repetitions: the table gives their mean and standard deviation. Written into the
sweep's directory: ``sweep.json`` (every job), ``sweep.csv`` (the table) and ``sweep_<metric>.png``.
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
    """

    def __init__(self, metrics: Sequence[str] | None = None, x: str | None = None):
        self.metrics, self.x = list(metrics or []), x

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        chosen = OmegaConf.select(config, "optimize")
        summarise(folder, self.metrics or ([chosen] if chosen else []), self.x)


def summarise(folder: Path, metrics: Sequence[str] = (), x: str | None = None) -> list[dict[str, Any]]:
    """Write and print the table of the finished jobs below ``folder``; returns its rows. Nothing where none is finished."""
    jobs = read_jobs(folder)
    if not jobs:
        return []
    metrics = [m for m in metrics if any(m in job.metrics for job in jobs)] or list(jobs[0].metrics)[:4]
    axes = sorted({key for job in jobs for key in job.settings if key != SEED})
    rows = _rows(jobs, axes, metrics)
    (folder / "sweep.json").write_text(json.dumps([job._asdict() for job in jobs], indent=1))
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*axes, "jobs", *(f"{m} {what}" for m in metrics for what in ("mean", "std"))])
        writer.writeheader()
        writer.writerows(rows)
    _print(folder, rows, axes, metrics)
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


def _print(folder: Path, rows: list[dict[str, Any]], axes: list[str], metrics: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{folder.name}  (mean ± standard deviation over seeds)")
    for column in (*axes, "jobs", *metrics):
        table.add_column(column, justify="left" if column in axes else "right")
    for row in rows:
        cells = [f"{row[f'{m} mean']:.2f}" + _spread(row[f"{m} std"]) for m in metrics]
        table.add_row(*(row[axis] for axis in axes), str(row["jobs"]), *cells)
    console = Console(width=None if Console().is_terminal else 180)
    console.print(table)
    console.print(f"table, plots and every job: {folder}", markup=False, highlight=False)


def _spread(deviation: float) -> str:
    return "" if math.isnan(deviation) else f" ± {deviation:.2f}"


def _plot(rows: list[dict[str, Any]], axes: list[str], x: str, metric: str, path: Path) -> None:
    """A curve for each setting of the other axes, with the spread over seeds."""
    from experiments.pictures import _pyplot, _save

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
