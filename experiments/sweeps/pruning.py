"""Ends jobs of a search early whose held-out metric falls behind that of the other jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl

from models.errors import UserError
from models.io import atomic_write

FILE = "trial.json"


class Pruned(UserError):
    """The search ended this job early. Not a failure: the search has counted it."""


class TrialFile(NamedTuple):
    """Which trial of which search a run directory belongs to; written by the search before the job starts.

    Attributes:
        journal: the search's journal, which all workers share.
        study: name of the search.
        trial: the trial's identifier in the journal.
        pruned: whether the search prunes.
    """

    journal: str
    study: str
    trial: int
    pruned: bool

    def write(self, folder: Path) -> None:
        with atomic_write(folder / FILE) as temporary:
            temporary.write_text(json.dumps(self._asdict()))


class Pruning(pl.Callback):
    """Reports the held-out metric that decides on the best checkpoint after each validation of a job of a search.

    In any other run it does nothing.

    Args:
        monitor: the logged metric; null: no pruning.
        mode: whether it should grow or shrink.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] = "max"):
        self.monitor, self.mode = monitor, mode
        self.trial: Any = None
        self.sign = 1.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        file = Path(trainer.default_root_dir) / FILE
        if not file.is_file() or not trainer.is_global_zero:
            return
        facts = TrialFile(**json.loads(file.read_text()))
        if facts.pruned and self.monitor:
            import optuna

            from experiments.sweeps.search import open_study

            study = open_study(facts.journal, facts.study)
            self.trial = optuna.trial.Trial(study, facts.trial)
            maximised = study.direction == optuna.study.StudyDirection.MAXIMIZE
            self.sign = 1.0 if maximised == (self.mode == "max") else -1.0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        prune = False
        if self.trial is not None and not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            self.trial.report(self.sign * float(trainer.callback_metrics[self.monitor]), trainer.global_step)
            prune = self.trial.should_prune()
        if trainer.world_size > 1:
            prune = trainer.strategy.reduce_boolean_decision(prune, all=False)
        if prune:
            raise Pruned(f"pruned at step {trainer.global_step}: {self.monitor} is behind that of the other trials.")
