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
    table = Table(title=f"{run.record['experiment']}  (percent unless the name says otherwise)")
    table.add_column("metric")
    for column in ("this run", *baselines):
        table.add_column(column, justify="right")
    for name, value in metrics.items():
        others = (_number(baseline.get(name)) for baseline in baselines.values())
        table.add_row(name, _number(value), *others)
    console = screen.console()
    console.print(table)
    for note in run.notes:
        console.print(f"! {note}", markup=False)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in durations.items() if seconds is not None)
    console.print(f"{spent}\nresult, figures and checkpoints: {run.dir}", markup=False)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"
