"""What a training step costs that everything logs: ``metrics.csv``, W&B offline, progress, learning rates, waiting for data.

A module of one small layer is trained with the callbacks and loggers of a run, and with Lightning's own loop alone. The
difference is the cost of logging, whatever the step of a real method takes.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from experiments.run import loggers
from experiments.run.callbacks import DataWait, RandomSteps, TrainingProgress
from lightning_modules.base import BaseModule, StepOutput
from models.batch import INDEX

STEPS, EVERY = 2000, 10  # a row of metrics each ``log_every_n_steps``, as trainer=default has it


class _Layer(BaseModule):
    """Three losses and two reports, as many as methods log."""

    def __init__(self) -> None:
        super().__init__(torch.optim.AdamW)
        self.layer = torch.nn.Linear(8, 8)

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        loss = F.mse_loss(self.layer(batch["x"]), batch["x"])
        return StepOutput({"a": loss, "b": loss, "c": loss}, {"d": loss.detach(), "e": loss.detach()})


def _milliseconds(logged: bool) -> float:
    """CPU time of a step."""
    rows = [{"x": torch.zeros(8), INDEX: row} for row in range(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"logger": False, "log_every_n_steps": 10 * STEPS}
        if logged:
            metrics = loggers.MetricsFile(Path(folder))
            wandb = loggers.wandb_logger(Path(folder), "bench", {}, "bench", mode="offline")
            callbacks = [TrainingProgress(), RandomSteps(0), pl.callbacks.LearningRateMonitor("step"), DataWait()]
            settings = {"logger": [metrics, wandb], "callbacks": callbacks, "log_every_n_steps": EVERY}
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **settings,
        )
        began = time.process_time()
        trainer.fit(_Layer(), DataLoader(rows, batch_size=1))  # type: ignore[arg-type]
        spent = time.process_time() - began
        loggers.finish_wandb(succeeded=True)
    return 1000 * spent / STEPS


def _cost() -> dict[str, float]:
    logged, plain = _milliseconds(True), _milliseconds(False)
    return {"logged_ms": logged, "plain_ms": plain, "difference_ms": logged - plain}


MEASURES = {"step": _cost}
