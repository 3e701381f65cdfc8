"""A callback that finds the learning rate by a range test on training batches before the first step."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from models.errors import UserError
from models.optim.lr_range import range_test

log = logging.getLogger("run")


class LearningRateRangeTest(pl.Callback):
    """Sets the optimiser's rate to what :func:`~models.optim.lr_range.range_test` suggests, as STRUCTURE's official code does.

    It runs once, at the start of a training; a resumed one has its rate from the checkpoint. Loss terms that warm up (modules
    with ``warmup_steps``) count with their full weight.

    Args:
        iterations: batches of the test.
        start: lowest rate.
        end: highest rate.
    """

    def __init__(self, iterations: int = 100, start: float = 1e-7, end: float = 10.0):
        self.iterations, self.start, self.end = iterations, start, end

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step or trainer.current_epoch:
            return
        if len(trainer.optimizers) != 1 or len(trainer.optimizers[0].param_groups) != 1:
            raise UserError("the learning-rate range test needs one optimiser with one parameter group: module.decay_all=true.")
        batches = itertools.cycle(itertools.islice(iter(trainer.train_dataloader), self.iterations))

        def loss(_: int) -> torch.Tensor:
            batch = pl_module.transfer_batch_to_device(next(batches), pl_module.device, 0)
            return pl_module.batch_loss(batch)

        modules: Iterator[Any] = pl_module.modules()
        warmups = {module: module.warmup_steps for module in modules if hasattr(module, "warmup_steps")}
        for module in warmups:
            module.warmup_steps = 0
        try:
            rate = range_test(
                pl_module,
                pl_module.optimizer_factory,
                loss,
                self.iterations,
                self.start,
                self.end,
                before_step=lambda: pl_module.on_before_optimizer_step(trainer.optimizers[0]),
            )
        finally:
            for module, steps in warmups.items():
                module.warmup_steps = steps
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] = rate
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            multiplier = pl_module.multiplier(rate)  # a schedule with absolute bounds depends on the rate
            scheduler.base_lrs, scheduler.lr_lambdas = [rate], [multiplier]
            trainer.optimizers[0].param_groups[0]["lr"] = rate * multiplier(0)
        log.info("learning-rate range test: %.3g", rate)
