"""Stage ``report``: the table on screen, ``result.json``, figures, and the summary of the W&B run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.figures import canvas
from experiments.run import loggers
from experiments.run.directory import Run, environment
from models.io import atomic_write

log = logging.getLogger("run")


def report(run: Run) -> dict[str, Any]:
    """Put everything the run found where a person looks for it."""
    evaluated = run.facts("evaluate") or run.facts("assess")
    metrics = evaluated.get("metrics", {})
    baselines = {name: facts.get("metrics", {}) for name, facts in evaluated.get("compare", {}).items()}
    baselines |= evaluated.get("baselines", {})
    durations = {name: stage.get("seconds") for name, stage in run.record["stages"].items()}
    result = {
        "experiment": run.record["experiment"],
        "metrics": metrics,
        "baselines": baselines,
        "notes": run.notes,
        "hashes": evaluated.get("hashes", {}),
        "encoders": run.facts("encode").get("encoders", {}),
        "skipped": run.record.get("skipped", {}),
        "durations": durations,
        "environment": environment(),
    }
    with atomic_write(run.dir / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, default=str))
    drawn = _draw(run)
    loggers.log_wandb_pictures(drawn, metrics)
    _print_table(run, metrics, baselines, durations)
    return {"figures": [str(path) for path in drawn.values()]}


def _draw(run: Run) -> dict[str, Path]:
    folder, drawn = run.dir / "figures", {}
    if (run.dir / "metrics.csv").is_file():
        drawn["loss"] = canvas.loss_curves(loggers.read_metrics(run.dir / "metrics.csv"), folder / "loss.png")
    drawn |= {name: folder / file for name, file in (run.facts("evaluate") or run.facts("assess")).get("figures", {}).items()}
    return {name: path for name, path in drawn.items() if path is not None}


def _print_table(run: Run, metrics: dict, baselines: dict[str, dict], durations: dict) -> None:
    table = Table(title=f"{run.record['experiment']}  (percent unless the name says otherwise)")
    table.add_column("metric")
    for column in ("this run", *baselines):
        table.add_column(column, justify="right")
    for name, value in metrics.items():
        others = (_number(baseline.get(name)) for baseline in baselines.values())
        table.add_row(name, _number(value), *others)
    # On a pipe rich would wrap at 80 columns and tear the names apart.
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for note in run.notes:
        console.print(f"! {note}", markup=False)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in durations.items() if seconds is not None)
    console.print(f"{spent}\nresult, figures and checkpoints: {run.dir}", markup=False, highlight=False)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"
