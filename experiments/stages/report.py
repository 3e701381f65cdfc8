"""Stage ``report``: the table on screen, ``result.json``, figures, and the summary of the W&B run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rich.table import Table

from experiments.figures import canvas
from experiments.run import loggers, screen
from experiments.run.directory import Run, environment
from experiments.stages import Facts, stage
from models.io import atomic_write

log = logging.getLogger("run")
FRAME, NUMBER = 3, 8  # characters around a column of the table, and of most numbers


@stage(repeat=True)
def report(run: Run) -> Facts:
    """Write ``result.json``, draw the loss curves and print the table.

    A stage adds to the report by its facts: ``metrics``, ``baselines`` (columns), ``hashes``, ``figures``, ``errors``, and
    ``result``, further entries of ``result.json``.
    """
    facts = {name: stage["facts"] for name, stage in run.record["stages"].items()}
    metrics = _merged(facts, "metrics")
    baselines = {name: column.get("metrics", {}) for name, column in _merged(facts, "columns").items()}
    baselines |= _merged(facts, "baselines")
    durations = {name: stage.get("seconds") for name, stage in run.record["stages"].items()}
    result = {
        "experiment": run.record["experiment"],
        "metrics": metrics,
        "baselines": baselines,
        "notes": run.notes,
        "hashes": _merged(facts, "hashes"),
        **_merged(facts, "result"),
        "skipped": run.record.get("skipped", {}),
        "durations": durations,
        "environment": environment(),
    }
    with atomic_write(run.dir / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, default=str))
    drawn = _draw(run, _merged(facts, "figures"))
    errors = {name: run.dir / "errors" / file for name, file in _merged(facts, "errors").items()}
    loggers.log_wandb_results(run, metrics, drawn, errors)
    _print_table(run, metrics, baselines, durations)
    return {}


def _merged(facts: dict[str, Facts], key: str) -> dict:
    """One dict of what the stages left under ``key``."""
    return {name: value for of_stage in facts.values() for name, value in of_stage.get(key, {}).items()}


def _draw(run: Run, figures: dict[str, str]) -> dict[str, Path]:
    folder, drawn = run.dir / "figures", {}
    if (run.dir / "metrics.csv").is_file():
        drawn["loss"] = canvas.loss_curves(loggers.read_metrics(run.dir / "metrics.csv"), folder / "loss.png")
    drawn |= {name: folder / file for name, file in figures.items()}
    return {name: path for name, path in drawn.items() if path is not None}


def _print_table(run: Run, metrics: dict, baselines: dict[str, dict], durations: dict) -> None:
    console = screen.console()
    for names in _groups(metrics, baselines, console.width):
        table = Table(title=f"{run.record['experiment']}  (percent unless the name says otherwise)")
        table.add_column("metric", no_wrap=True)
        for column in ("this run", *names):
            table.add_column(column, justify="right", no_wrap=True)
        for name, value in metrics.items():
            table.add_row(name, _number(value), *(_number(baselines[column].get(name)) for column in names))
        console.print(table)
    for note in run.notes:
        console.print(f"! {note}", markup=False)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in durations.items() if seconds is not None)
    console.print(f"{spent}\nresult, figures and checkpoints: {run.dir}", markup=False)


def _groups(metrics: dict, baselines: dict[str, dict], width: int) -> list[list[str]]:
    """The columns beside this run's, in as many tables as hold them: none is cut. A table has one at least."""
    groups: list[list[str]] = [[]]
    free = start = width - 1 - sum(max(map(len, column)) + FRAME for column in (["metric", *metrics], ["this run"]))
    for name in baselines:
        need = max(len(name), NUMBER) + FRAME
        if need > free and groups[-1]:
            groups.append([])
            free = start
        groups[-1].append(name)
        free -= need
    return groups


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"
