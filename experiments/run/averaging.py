"""An exponential moving average of the weights, for any method: validated, evaluated, saved and resumed."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from experiments.run.callbacks import Checkpoints
from models.errors import UserError
from models.optim.ema import ema_update_
from models.sharded import local, part_of, whole_of

RAW = "raw_weights"  # of a checkpoint: the weights that training goes on from; its own are the averages
STATISTICS = ("running_mean", "running_var")  # of normalisation layers; other buffers are taken as they are


class WeightAverage(pl.Callback):
    """Keeps ``average <- decay * average + (1 - decay) * weights`` after each optimiser step.

    Validation sees the averages, and so do the stages after the training, since checkpoints hold them as the weights. The
    weights that are trained are in the checkpoint, too, so that a resumed run equals one that was never stopped.

    Lightning's own callback saves the wrong copy during a validation, and the averages alone at the end.

    Args:
        decay: factor of the old average at each step.
        warm_up: whether the factor grows with the step, ``min(decay, (1 + step) / (10 + step))``, so that the first weights
            are soon forgotten.
    """

    def __init__(self, decay: float = 0.999, warm_up: bool = True):
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.average.decay={decay} must be at least 0 and below 1.")
        self.decay, self.warm_up = decay, warm_up
        self.other: dict[str, Tensor] = {}  # the copy that is not in the module: averages, during a validation raw weights
        self.averages_in_module = False
        self.step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it by setattr
        order = [type(callback) for callback in callbacks]
        if Checkpoints in order and order.index(Checkpoints) < order.index(WeightAverage):
            raise UserError("callbacks.average must stand before callbacks.checkpoints, as in callbacks=averaged.")
        values = _averaged(pl_module)
        if self.other:  # read from a checkpoint before Lightning moved the module to its device
            names = dict(pl_module.named_parameters())  # meanwhile they may have been sharded
            parts = {name: part_of(value, names.get(name, value)) for name, value in self.other.items()}
            self.other = {name: value.to(values[name].device) for name, value in parts.items()}
        else:
            self.other = {name: value.clone() for name, value in values.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step  # a resumed run's is read after on_fit_start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if trainer.global_step == self.step:  # gradients are being accumulated
            return
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step)) if self.warm_up else self.decay
        values = _averaged(pl_module)
        ema_update_(list(self.other.values()), [values[name] for name in self.other], decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.averages_in_module:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, module: pl.LightningModule) -> None:
        for name, value in _averaged(module).items():
            in_module = value.clone()
            value.copy_(self.other[name])
            self.other[name].copy_(in_module)
        self.averages_in_module = not self.averages_in_module

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        in_module = {name: value for name, value in checkpoint["state_dict"].items() if name in self.other}
        names = dict(pl_module.named_parameters())
        other = {name: whole_of(value, names.get(name, value)) for name, value in self.other.items()}
        averages, raw = (in_module, other) if self.averages_in_module else (other, in_module)
        checkpoint["state_dict"] = checkpoint["state_dict"] | averages
        checkpoint[RAW] = {name: value.detach().clone() for name, value in raw.items()}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        values = _averaged(pl_module)
        if RAW not in checkpoint:  # of a run without averages: they begin here
            return
        self.other = {name: checkpoint["state_dict"][name].clone() for name in values}
        with torch.no_grad():
            for name, value in values.items():
                value.copy_(checkpoint[RAW][name])


def _averaged(module: pl.LightningModule) -> dict[str, Tensor]:
    """The tensors that are averaged, as far as this rank holds them: trainable parameters and running statistics."""
    parameters = {name: local(value.data) for name, value in module.named_parameters() if value.requires_grad}
    buffers = {name: value for name, value in module.named_buffers() if name.rpartition(".")[2] in STATISTICS}
    return parameters | buffers
