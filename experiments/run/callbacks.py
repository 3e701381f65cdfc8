"""Lightning callbacks of every run: checkpoints, progress, and leaving on a signal without losing a step."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch

from experiments.run import interruption
from experiments.run.progress import Progress
from models.errors import UserError

log = logging.getLogger("run")


class Checkpoints(pl.Callback):
    """Keeps two checkpoints, ``checkpoints/best`` and ``checkpoints/last``, in the run directory.

    Lightning's ModelCheckpoint renames on resume and cannot write one stable ``last`` by time, at the end and on a
    signal alike; this does just that.

    Args:
        monitor: logged metric that decides what is best; null keeps only ``last``.
        mode: whether the metric should grow or shrink.
        every_n_minutes: how much work a crash may cost; a signal costs none.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] = "min", every_n_minutes: float = 10.0):
        self.monitor, self.mode, self.every_n_minutes = monitor, mode, every_n_minutes
        self.best: float | None = None
        self.saved_at = time.monotonic()

    def state_dict(self) -> dict:
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / name)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved_at = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(map(str, trainer.callback_metrics)))
            raise UserError(f"callbacks.checkpoints.monitor: '{self.monitor}' is not logged. Logged: {known}")
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if better and not math.isnan(value):
            self.best = value
            self._save(trainer, "best")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        stop = interruption.received() is not None
        if trainer.world_size > 1:  # all ranks must save together
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        due = time.monotonic() - self.saved_at > 60 * self.every_n_minutes
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)
        if stop or due:
            self._save(trainer, "last")
            self.saved_at = time.monotonic()
        if stop:
            log.warning("stopping at step %d; resume=auto goes on from here", trainer.global_step)
            raise interruption.Interrupted(interruption.received() or 15)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, "last")


class RandomSteps(pl.Callback):
    """Makes what a step draws (dropout, order of patches, ...) a function of seed, step and rank: a resumed run repeats it."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        torch.manual_seed((self.seed * 1_000_003 + done) * 4099 + trainer.global_rank)


class TrainingProgress(pl.Callback):
    """Steps, rate, time left and the loss of the whole training, across epochs."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        self.progress = Progress("train", total, start=trainer.global_step)
        self.progress.__enter__()
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, *args: object) -> None:
        if trainer.global_step > self.step:

            def note() -> str:
                loss = f" loss {float(outputs['loss']):.4g}" if isinstance(outputs, dict) else ""
                return f"epoch {trainer.current_epoch}{loss}"

            self.progress.advance(trainer.global_step - self.step, note)
            self.step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.__exit__(None, None, None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "progress"):
            self.progress.__exit__(type(exception), exception, None)
