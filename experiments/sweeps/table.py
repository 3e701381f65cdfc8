"""One table over the jobs of a sweep: a Hydra callback, for every sweep.

Jobs that differ in ``seed`` alone are repetitions: the table gives their mean and standard deviation. Written into the
sweep's directory after every job: ``sweep.json`` (every job), ``sweep.csv`` (the table, all metrics) and ``sweep.html``
(tables, curves and differences, for a browser); at the end also ``sweep_<metric>.png``. Where one override is ``paired``,
a second table gives what it changes job by job.
"""

from __future__ import annotations

import atexit
import csv
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config.overrides import as_written, key_of
from experiments.run.screen import console
from models.errors import UserError
from models.io import atomic_write

SEED = "seed"
SECONDS_BETWEEN_PAGES = 60  # while jobs run
SHOWN = 6  # metrics on the screen where none are chosen


class Job(NamedTuple):
    """What one finished job was given and what it found."""

    settings: dict[str, str]
    metrics: dict[str, float]
    folder: str = ""
    overrides: Sequence[str] = ()


class SweepTable(Callback):
    """Writes the table after every job, and prints it when the last one is done, with the jobs that failed and the best one.

    Args:
        metrics: which metrics of result.json are shown; null: the one that ``optimize`` names, else the first of each task.
        x: the override along the plot's axis; null: the numeric one with the most values.
        paired: an override whose values are compared job by job: a second table, ``sweep_paired.csv``, gives the mean and
            standard deviation over seeds of the difference from its first value, all else and the seed being the same.
        mode: whether the metric that ``optimize`` names should be large or small.
    """

    def __init__(
        self,
        metrics: Sequence[str] | None = None,
        x: str | None = None,
        paired: str | None = None,
        mode: Literal["max", "min"] = "max",
    ):
        self.metrics, self.x, self.paired, self.mode = list(metrics or []), x, paired, mode
        self.failed: dict[str, str] = {}  # overrides of a job -> the reason
        self.written = -math.inf  # when the page was written last

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from experiments.sweeps.definition import check_definition

        try:
            check_definition(config)
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise SystemExit(2) from None  # of an Exception in a callback Hydra makes a warning
        atexit.register(self._show, config)  # after a failed job Hydra leaves before on_multirun_end

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        atexit.unregister(self._show)
        self._show(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        job_return.overrides = as_written(job_return.overrides or ())  # Hydra prints those of a job that failed
        if config.hydra.mode == RunMode.MULTIRUN:
            if job_return.status != JobStatus.COMPLETED:
                reason = str(job_return._return_value).strip().splitlines() or [type(job_return._return_value).__name__]
                self.failed[" ".join(as_written(config.hydra.overrides.task))] = reason[0]  # .return_value would raise it
            write(Path(config.hydra.sweep.dir), self.failed)
            if time.monotonic() - self.written > SECONDS_BETWEEN_PAGES:  # it reads the curves of all jobs
                self._page(Path(config.hydra.sweep.dir))

    def _page(self, folder: Path, paired: dict[str, Any] | None = None) -> None:
        from experiments.sweeps.page import write_page

        jobs, axes, metrics, rows = write(folder, self.failed)
        write_page(folder, jobs, rows, axes, metrics, self.failed, paired)
        self.written = time.monotonic()

    def _show(self, config: DictConfig) -> None:
        folder = Path(config.hydra.sweep.dir)
        optimized = OmegaConf.select(config, "optimize")
        metrics = self.metrics or ([optimized] if optimized else [])
        summarise(folder, metrics, self.x, self.failed)
        paired = None
        if self.paired:
            params = OmegaConf.select(config, "hydra.sweeper.params") or {}
            first = str(params.get(self.paired, "")).split(",")[0].strip() or None
            rows = summarise_pairs(folder, metrics, self.paired, first)
            paired = {"against": f"{self.paired}={first}" if first else f"the first {self.paired}", "rows": rows}
        self._page(folder, paired)
        for overrides, reason in self.failed.items():
            print(f"failed: {overrides}\n        {reason}")
        if optimized and (job := best_job(read_jobs(folder), optimized, self.mode)):
            print(f"best by {optimized} ({self.mode}, mean over seeds): {label_of(job.settings) or 'the only one'}")
            print(f"  {command_of(job)}")


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
            differences = {m: job.metrics[m] - of.metrics[m] for m in metrics if m in job.metrics and m in of.metrics}
            changed.append(Job(job.settings, differences))
    if not changed:
        return []
    axes = _axes(changed)
    rows = _rows(changed, axes, metrics)
    _write(folder / "sweep_paired.csv", rows, axes, metrics)
    title = f"{folder.name}: change against {paired}={first}, job by job  (mean ± standard deviation over seeds)"
    _print(title, rows, axes, metrics, "+")
    return rows


def write(folder: Path, failed: dict[str, str] | None = None) -> tuple[list[Job], list[str], list[str], list[dict[str, Any]]]:
    """Write ``sweep.json`` and ``sweep.csv`` of the finished jobs below ``folder`` and of those that ``failed``.

    Returns:
        the jobs, the overrides in which they differ, the names of all metrics, and the rows of the table.
    """
    jobs = read_jobs(folder)
    axes, metrics = _axes(jobs), list(dict.fromkeys(name for job in jobs for name in job.metrics))
    rows = _rows(jobs, axes, metrics)
    entries = [job._asdict() for job in jobs]
    entries += [{"overrides": overrides, "failed": reason} for overrides, reason in (failed or {}).items()]
    with atomic_write(folder / "sweep.json") as temporary:
        temporary.write_text(json.dumps(entries, indent=1))
    if jobs:
        _write(folder / "sweep.csv", rows, axes, metrics)
    return jobs, axes, metrics, rows


def summarise(
    folder: Path, metrics: Sequence[str] = (), x: str | None = None, failed: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Write the table, print it and draw its curves; returns its rows. Nothing is printed where no job is finished."""
    jobs, axes, every, rows = write(folder, failed)
    if not jobs:
        return []
    metrics = [m for m in metrics if m in every] or list({m.rpartition("/")[0]: m for m in reversed(every)}.values())[::-1][
        :SHOWN
    ]
    _print(f"{folder.name}  (mean ± standard deviation over seeds)", rows, axes, metrics)
    print(f"all {len(every)} metrics, curves and every job: {folder / 'sweep.html'}")
    x = x if x in axes else _numeric_axis(jobs, axes)
    if x is not None:
        for metric in metrics:
            _plot(rows, axes, x, metric, folder / f"sweep_{metric.replace('/', '_')}.png")
    return rows


def read_jobs(folder: Path) -> list[Job]:
    """The finished jobs with the settings in which they differ; of two with one configuration the first."""
    jobs: dict[str, Job] = {}
    for file in sorted(folder.glob("*/result.json")):
        record = json.loads((file.parent / "run.json").read_text())
        if record["status"] == "finished":
            overrides = record["overrides"]
            job = Job(_settings(overrides), json.loads(file.read_text())["metrics"], str(file.parent), overrides)
            jobs.setdefault(record.get("identity", file.parent.name), job)
    keys = {key for job in jobs.values() for key in job.settings}
    same = {key for key in keys if len({job.settings.get(key) for job in jobs.values()}) == 1}
    return [job._replace(settings={k: v for k, v in job.settings.items() if k not in same}) for job in jobs.values()]


def best_job(jobs: Sequence[Job], metric: str, mode: Literal["max", "min"]) -> Job | None:
    """The job whose settings have the best mean of ``metric`` over seeds, of its seeds the best; None where none has it."""
    sign = 1 if mode == "max" else -1
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if not math.isnan(job.metrics.get(metric, math.nan)):
            groups.setdefault(label_of({key: value for key, value in job.settings.items() if key != SEED}), []).append(job)
    if not groups:
        return None
    best = max(groups.values(), key=lambda group: sign * statistics.fmean(job.metrics[metric] for job in group))
    return max(best, key=lambda job: sign * job.metrics[metric])


def command_of(job: Job) -> str:
    """The command that evaluates a job again; with ``resume=<job>`` in place of the last two it goes on or exports."""
    overrides = [o for o in job.overrides if key_of(o) not in ("optimize", "sweep_name", "stages")]
    if any(key_of(o) == "sweep" for o in overrides):  # whose YAML asks for many jobs
        overrides.append("hydra.mode=RUN")
    return f"python run.py {shlex.join(as_written(overrides))} \"checkpoint='{job.folder}'\" 'stages=[evaluate,report]'"


def _settings(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (override.lstrip("+~").partition("=") for override in overrides)
    return {key: value for key, _, value in pairs}


def label_of(settings: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(settings.items()))


def _axes(jobs: Sequence[Job]) -> list[str]:
    return sorted({key for job in jobs for key in job.settings if key != SEED})


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
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*axes, "jobs", *(f"{m} {part}" for m in metrics for part in ("mean", "std"))])
        writer.writeheader()
        writer.writerows(rows)


def _print(title: str, rows: list[dict[str, Any]], axes: list[str], metrics: list[str], sign: str = "") -> None:
    from rich.table import Table

    table = Table(title=title)
    for column in (*axes, "jobs", *metrics):
        table.add_column(column, justify="left" if column in axes else "right", overflow="fold")
    for row in rows:
        spread = {m: "" if math.isnan(row[f"{m} std"]) else f" ± {row[f'{m} std']:.2f}" for m in metrics}
        cells = [f"{row[f'{m} mean']:{sign}.2f}{spread[m]}" for m in metrics]
        table.add_row(*(row[axis] for axis in axes), str(row["jobs"]), *cells)
    console().print(table)


def _plot(rows: list[dict[str, Any]], axes: list[str], x: str, metric: str, path: Path) -> None:
    """A curve for each setting of the other axes, with the spread over seeds."""
    from experiments.figures import canvas

    others = [axis for axis in axes if axis != x]
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        label = ", ".join(f"{axis}={row[axis]}" for axis in others) or metric
        curves.setdefault(label, []).append((float(row[x]), row[f"{metric} mean"], row[f"{metric} std"]))
    drawing, ((axis,),) = canvas.figure(figsize=(6.4, 4.2))
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
    canvas.save(drawing, path)
