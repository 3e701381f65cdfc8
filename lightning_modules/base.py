"""What every method shares: one sum of weighted losses, one way to build optimisers, and a stop when a loss is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from models.batch import INDEX
from models.errors import UserError


class StepOutput(NamedTuple):
    """What one step computed.

    ``losses`` are scalars that are weighted and summed once, by the base; ``report`` is logged and never enters the sum;
    ``outputs`` are tensors that validation collects; an ``INDEX`` among them names the samples that the losses are of,
    where they are not those of the batch.
    """

    losses: Mapping[str, Tensor]
    report: Mapping[str, Tensor] = {}
    outputs: Mapping[str, Tensor] = {}


class LossNotFinite(UserError):
    """A loss term became NaN or infinite."""


class BaseModule(pl.LightningModule):
    """A method as a LightningModule. A family implements :meth:`shared_step`; the rest are hooks with sound defaults.

    Args:
        optimizer: factory ``(parameter groups) -> Optimizer``; None for a module that is never trained.
        scheduler: factory ``(total_steps) -> multiplier(step)``, the learning rate's factor at each optimiser step.
        loss_weights: factor of each loss term; a term that is not named has weight 1.
    """

    # Losses that contrast every sample with the whole batch change meaning when a batch is cut into accumulated pieces.
    needs_whole_batch = False

    def __init__(
        self,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[int], Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.loss_weights = dict(loss_weights or {})

    @classmethod
    def conflicts(cls, config: Mapping[str, Any]) -> list[str]:
        """Problems of a whole configuration that this method cannot be trained with."""
        pieces = config["trainer"].get("accumulate_grad_batches") or 1
        if not cls.needs_whole_batch or pieces == 1:
            return []
        return [
            f"trainer.accumulate_grad_batches: {pieces} would shrink the negatives of a contrastive loss to one piece of the "
            "batch, which is another objective. Raise the batch size instead, or use more devices."
        ]

    # ---- what a family implements -------------------------------------------------------------------------------

    def shared_step(self, batch: dict, stage: str) -> StepOutput:
        """Losses, reports and outputs of one batch; ``stage`` is 'train', 'val' or 'test'."""
        raise NotImplementedError

    def parameter_groups(self) -> Iterable:
        """Groups for the optimiser; by default every trainable parameter in one group.

        A group may hold ``lr_scale``, a factor of the optimiser's learning rate for its parameters.
        """
        return [p for p in self.parameters() if p.requires_grad]

    def after_optimizer_step(self) -> None:
        """Runs after each optimiser step, outside autograd: clamps, momentum encoders."""

    def multipliers(
        self, optimizer: torch.optim.Optimizer, total_steps: int
    ) -> Callable[[int], float] | list[Callable[[int], float]]:
        """The learning rate's factor at each optimiser step, one for all groups or a list with one for each."""
        return self.scheduler_factory(total_steps)

    def load_official(self, weights: dict[str, Tensor]) -> None:
        """Load a checkpoint of the official implementation, given as official names and tensors."""
        raise UserError(f"{type(self).__name__} has no importer of official checkpoints.")

    def load_pretrained(self, weights: dict[str, Tensor]) -> bool:
        """Begin fine-tuning from a run of ours whose heads are others: take what fits. False: this method has no such way."""
        return False

    # ---- shared machinery ---------------------------------------------------------------------------------------

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        step = self.shared_step(batch, "train")
        total = self._total(step, batch)
        self._log("train", step, total, batch)
        return total

    def validation_step(self, batch: dict, batch_idx: int) -> StepOutput:
        step = self.shared_step(batch, "val")
        self._log("val", step, self._total(step, batch), batch)
        return step

    def batch_loss(self, batch: dict) -> Tensor:
        """The summed training loss of a batch, with nothing logged."""
        return self._total(self.shared_step(batch, "train"), batch)

    def _total(self, step: StepOutput, batch: dict) -> Tensor:
        unknown = self.loss_weights.keys() - step.losses.keys()
        if unknown:
            raise UserError(f"loss_weights names {sorted(unknown)}, but the loss has {sorted(step.losses)}.")
        total = sum(self.loss_weights.get(name, 1.0) * value for name, value in step.losses.items())
        if not torch.isfinite(total):
            terms = ", ".join(f"{name}={float(value):g}" for name, value in step.losses.items())
            ids = batch[INDEX].tolist()
            raise LossNotFinite(
                f"the loss is not finite at step {self.global_step}: {terms}. Samples (rows of the split): "
                f"{ids[:16]}{' ...' if len(ids) > 16 else ''}. Look at these samples, lower optimizer.lr, or train in "
                "trainer.precision=32-true. The last checkpoint is untouched."
            )
        return total

    def _log(self, stage: str, step: StepOutput, total: Tensor, batch: dict) -> None:
        values = {f"{stage}/loss": total.detach()}
        values |= {f"{stage}/loss/{name}": value.detach() for name, value in step.losses.items()}
        values |= {f"{stage}/{name}": value for name, value in step.report.items()}
        train = stage == "train"
        size = len(step.outputs.get(INDEX, batch[INDEX]))
        self.log_dict(values, on_step=train, on_epoch=not train, batch_size=size, sync_dist=not train)

    def configure_optimizers(self):
        if self.optimizer_factory is None:
            raise UserError(f"{type(self).__name__} was built without an optimizer; choose one: optimizer=<name>.")
        optimizer = self.optimizer_factory(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        if self.scheduler_factory is None:
            return optimizer
        multipliers = self.multipliers(optimizer, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multipliers)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.after_optimizer_step()
