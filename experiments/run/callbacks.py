"""Lightning callbacks of every run: checkpoints, progress, and leaving on a signal without losing a step."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from experiments.run import interruption
from experiments.run.loggers import MetricsFile
from experiments.run.progress import Progress
from models.errors import UserError

log = logging.getLogger("run")


class Checkpoints(pl.Callback):
    """Keeps two checkpoints, ``checkpoints/best`` and ``checkpoints/last``, in the run directory, and stops on a signal.

    A run that goes on from either equals one that was never stopped: they are written where an optimiser step is complete and
    the rows of the step are in metrics.csv, and a validation that is due or has not ended is run on resume.

    Lightning's ModelCheckpoint renames on resume, cannot write one stable ``last`` by time, at the end and on a signal alike,
    and what it writes after the last batch of an epoch resumes without that epoch's validation.

    Args:
        monitor: logged metric that decides what is best; null keeps only ``last``.
        mode: whether the metric should grow or shrink.
        every_n_minutes: how much work a crash may cost; a signal costs none.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] = "min", every_n_minutes: float = 10.0):
        self.monitor, self.mode, self.every_n_minutes = monitor, mode, every_n_minutes
        self.best: float | None = None
        self.validation_due = False  # in the state that is saved: between a step and the end of the validation after it
        self.saved_at = time.monotonic()
        self.group: Any = None

    def state_dict(self) -> dict:
        return {"best": self.best, "validation_due": self.validation_due}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.validation_due = state["best"], state["validation_due"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        file = next((logger for logger in trainer.loggers if isinstance(logger, MetricsFile)), None)
        checkpoint["metrics_bytes"] = file.sync() if file else 0
        if self.validation_due:  # Lightning's state of a validation that was left in its first batch: it begins anew
            progress = checkpoint["loops"]["fit_loop"]
            for count in ("total", "current"):
                batches = progress["epoch_loop.batch_progress"][count]
                batches["completed"] = batches["processed"]
                left = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
                progress["epoch_loop.val_loop.batch_progress"][count] = left

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / name)

    def _stop(self, trainer: pl.Trainer, signum: int) -> None:
        log.warning("stopping at step %d; resume=auto goes on from here", trainer.global_step)
        raise interruption.Interrupted(signum)

    def _agreed(self, trainer: pl.Trainer, signum: int, due: bool) -> tuple[int, bool]:
        """The signal that any rank has received (0: none), and whether rank 0 finds a checkpoint due."""
        if trainer.world_size == 1:
            return signum, due
        if self.group is None:  # on the CPU: reading the answer from a GPU would wait for the step
            self.group = dist.new_group(backend="gloo")
        votes = torch.tensor([signum, due and trainer.is_global_zero], dtype=torch.int64)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group)
        return int(votes[0]), bool(votes[1])

    def _validation_follows(self, trainer: pl.Trainer) -> bool:
        loop = trainer.fit_loop.epoch_loop
        if not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            return False
        trainer.validating = True  # as Lightning does around this call
        loop.val_loop.setup_data()
        trainer.training = True
        return not loop.val_loop.skip

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.validation_due and trainer.max_steps != -1:  # else Lightning takes the training for done and leaves it out
            trainer.fit_loop.epoch_loop.max_steps += 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if trainer.fit_loop._should_accumulate():  # gradients are in no checkpoint
            return
        due = time.monotonic() - self.saved_at > 60 * self.every_n_minutes
        signum, due = self._agreed(trainer, interruption.received() or 0, due)
        if signum or due:
            trainer._logger_connector.update_train_step_metrics()  # Lightning's own call comes too late for the checkpoint
            self.validation_due = self._validation_follows(trainer)
            self._save(trainer, "last")
            self.validation_due = False
            self.saved_at = time.monotonic()
        if signum:
            self._stop(trainer, signum)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.validation_due:  # resumed
            self.validation_due = False
            if trainer.max_steps != -1:
                trainer.fit_loop.epoch_loop.max_steps -= 1
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()  # of an earlier validation of this epoch

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        signum = interruption.received()
        if signum is None or trainer.world_size > 1 or trainer.sanity_checking:  # ranks stop after the next step, together
            return
        self.validation_due = True
        self._save(trainer, "last")
        self._stop(trainer, signum)

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

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, "last")


class RandomSteps(pl.Callback):
    """Makes what a step or a validation draws (dropout, order of patches, ...) a function of seed, step and rank: a resumed
    run repeats it.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def _seed(self, trainer: pl.Trainer, device: torch.device) -> None:
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        done = batches.processed
        seed = (self.seed * 1_000_003 + done) * 4099 + trainer.global_rank
        if device.type == "cpu":  # without a stack trace for each kind of device that is not in use
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        self._seed(trainer, pl_module.device)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seed(trainer, pl_module.device)


class DataWait(pl.Callback):
    """Measures which share of the training a device waits for the next batch, from the end of a step to the begin of the next.

    On a GPU the times are taken on the device, without waiting for it: the host may wait for data while the device still
    works. Validation and checkpoints do not count, where this callback is the last one.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = {"waiting": 0.0, "working": 0.0}
        self.spans: deque[tuple[str, Any, Any]] = deque()  # not added up yet: kind, begin and end
        self.began: Any = None
        self.ended: Any = None

    @property
    def share(self) -> float:
        """Of the time of steps and waiting; 0 without a step."""
        self._add_up(wait=True)
        return self.seconds["waiting"] / (sum(self.seconds.values()) or 1.0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ended = _mark(pl_module.device)

    on_train_start = on_validation_end = on_train_epoch_start  # a training that goes on within an epoch has no start of it

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        self.began = _mark(pl_module.device)
        self.spans.append(("waiting", self.ended, self.began))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        self.steps += 1
        self.ended = _mark(pl_module.device)
        self.spans.append(("working", self.began, self.ended))
        self._add_up(wait=False)

    def _add_up(self, wait: bool) -> None:
        while self.spans:
            kind, begin, end = self.spans[0]
            if isinstance(end, float):
                self.seconds[kind] += end - begin
            else:
                if wait:
                    end.synchronize()
                elif not end.query():
                    return
                self.seconds[kind] += begin.elapsed_time(end) / 1000
            self.spans.popleft()


def _mark(device: torch.device) -> Any:
    """This moment on a device: an event on a GPU, else seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


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
