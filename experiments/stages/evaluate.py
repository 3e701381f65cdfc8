"""Stage ``evaluate``: the trained method on the test split, by every suite of the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from experiments.config.instantiation import build
from experiments.evaluation.base import SuiteResult
from experiments.evaluation.errors import write_table
from experiments.run import parts
from experiments.run.directory import Run
from experiments.stages import Facts, stage

log = logging.getLogger("run")


@stage(needs_weights=True)
def evaluate(run: Run, subject: Callable[[Run, str], Any] = parts.trained_split) -> Facts:
    """Run every suite; keeps metrics, baselines and hashes, draws the figures, and writes tables of errors.

    Of data without a held-out split it leaves a note.

    Args:
        run: the run.
        subject: ``(run, split) -> what the suites take``; by default the trained module and the split's data.
    """
    split = next((name for name in ("test", "val") if name in parts.datamodule(run).splits), None)
    facts: Facts = {"split": split, "metrics": {}, "baselines": {}, "hashes": {}, "figures": {}, "errors": {}}
    if split is None:
        run.note("NOT EVALUATED: the data has neither a test nor a val split.")
        return facts
    if split == "val":
        run.note("EVALUATED ON VAL: the data has no test split.")
    evaluated = None
    for name, suite in (run.cfg.evaluation or {}).items():
        if suite is None:  # a recipe does without a suite of the option it inherits
            continue
        evaluated = evaluated or subject(run, split)
        with torch.inference_mode():
            result: SuiteResult = build(suite)(evaluated)
        facts["metrics"] |= {f"{split}/{key}": value for key, value in result.metrics.items()}
        for column, values in result.baselines.items():
            facts["baselines"].setdefault(column, {}).update({f"{split}/{key}": value for key, value in values.items()})
        facts["hashes"][name] = result.hashes
        for figure, draw in result.figures.items():
            path = run.dir / "figures" / f"{figure}.png"
            path.parent.mkdir(exist_ok=True)
            draw(path)
            facts["figures"][figure] = path.name
        for table, rows in result.errors.items():
            if rows:
                facts["errors"][table] = write_table(run.dir / "errors", table, rows).name
        for note in result.notes:
            run.note(note)
    parts.note_skipped(run)
    log.info("evaluate %s: %d metrics of the split %s", run.record["experiment"], len(facts["metrics"]), split)
    return facts
