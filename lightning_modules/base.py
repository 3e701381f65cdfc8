"""What every method shares: one sum of weighted losses, one way to build optimisers, and a stop when a loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn

from lightning_modules.held_out import HeldOut, check_weights
from models.batch import INDEX
from models.errors import UserError
from models.optim.clipping import clip_together_
from models.optim.schedules import Multiplier


class StepOutput(NamedTuple):
    """What one step computed.

    Args:
        losses: scalars that the base weights and sums once.
        report: scalars that are logged and never enter the sum.
        outputs: predictions and truths by name, (B, ...) each, ``INDEX`` among them; of held-out splits alone they are read.
    """

    losses: Mapping[str, Tensor]
    report: Mapping[str, Tensor] = {}
    outputs: Mapping[str, Tensor] = {}


class RowWise(NamedTuple):
    """A method of a network whose output rows follow from the same rows of its inputs: of every tensor that it is given.

    Args:
        module: the network.
        method: its name.
        groups: the method takes lists whose entries have their own numbers of rows, and returns such a list.
    """

    module: nn.Module
    method: str = "forward"
    groups: bool = False


class LossNotFinite(UserError):
    """A loss term became NaN or infinite."""


class _Losses(NamedTuple):
    """The losses of a batch, on their device, and what a message about them must say."""

    step: int
    total: Tensor
    terms: dict[str, Tensor]
    rows: Tensor


class BaseModule(pl.LightningModule):
    """A method as a LightningModule. A family implements :meth:`shared_step`; the rest are hooks with sound defaults.

    Held-out numbers are those of one process, whatever the number of ranks: the rows of predictions of all ranks are joined,
    and :meth:`validation_metrics` is the function that the evaluation suite of the family uses, too.

    Gradients may be clipped per tensor or per submodule, and entries of the optimiser's groups other than the rate be set for
    the step (a schedule of the weight decay), in Lightning's ``on_before_optimizer_step``: it runs once per optimiser step,
    after the gradients are unscaled.

    Args:
        optimizer: factory ``(parameter groups) -> Optimizer``; None for a module that is never trained.
        scheduler: factory ``(total_steps, steps_per_epoch, base_lr) -> multiplier(step)`` of :mod:`models.optim.schedules`: the
            learning rate's factor at each optimiser step. It is called for each parameter group with that group's rate.
        loss_weights: factor of each loss term; a term that is not named has weight 1.
    """

    # Losses that compare every sample with the whole batch change meaning when a batch is cut into accumulated pieces.
    needs_whole_batch = False
    # Keys that every training batch must hold; a property where they follow from the settings.
    needs: tuple[str, ...] = ()

    def __init__(
        self,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Multiplier] | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.loss_weights = dict(loss_weights or {})
        self._step_begins = True
        self.loaded = False  # a checkpoint has given the weights
        self.fresh_heads: list[str] = []  # of ``model``, which no checkpoint has filled although one was loaded
        self._held_out = HeldOut()
        self._unread: list[_Losses] = []
        self._row: list[str] = []  # names of the numbers that Lightning was handed last

    @classmethod
    def conflicts(cls, config: Mapping[str, Any]) -> list[str]:
        """Problems of a whole configuration that this method cannot be trained with."""
        problems, trainer = [], config["trainer"]
        pieces = trainer.get("accumulate_grad_batches") or 1
        if cls.needs_whole_batch and pieces != 1:
            problems.append(
                f"trainer.accumulate_grad_batches: {pieces} would shrink what a sample is compared with, such as the negatives "
                "of a contrastive loss, to one piece of the batch: another objective. Set datamodule.batch_size to all "
                "pieces together and micro_batch_size to one piece: losses see the batch, networks run over a piece at a time."
            )
        scaled = str(trainer.get("precision")) in ("16-mixed", "16")
        if scaled and trainer.get("gradient_clip_val") and (config.get("optimizer") or {}).get("fused"):
            problems.append(
                "trainer.gradient_clip_val: a fused optimizer unscales float16 gradients after they are clipped. Set "
                "optimizer.fused=false, or train in bf16-mixed."
            )
        return problems

    # ---- what a family implements -------------------------------------------------------------------------------

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        """Losses, reports and, on held-out splits, rows of one batch; ``split`` is 'train', 'val' or 'test'."""
        raise NotImplementedError

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Metrics by flat name of the rows of a whole split, on the CPU; logged as ``val/<name>``. By default none."""
        return {}

    def parameter_groups(self) -> Iterable:
        """Groups for the optimiser; by default every trainable parameter in one group.

        A group may hold ``lr_scale``, a factor of the optimiser's learning rate for its parameters.
        """
        return [p for p in self.parameters() if p.requires_grad]

    def compiled_parts(self) -> list[nn.Module]:
        """Modules that ``compile=true`` compiles, each by itself: those that a step calls, and not through their methods."""
        return [part for child in self.children() for part in outermost_called(child)]

    def row_wise(self) -> list[RowWise]:
        """What ``micro_batch_size`` runs piece by piece. By default nothing: losses of single samples need no larger batch.

        None of these methods may call another one.
        """
        return []

    def before_forward(self) -> None:
        """Runs before the first forward pass of each optimiser step, outside autograd: momentum encoders that move first."""

    def after_optimizer_step(self) -> None:
        """Runs after each optimiser step, outside autograd: clamps, momentum encoders that follow."""

    def initial_weights(self) -> Callable[[], None] | None:
        """What loads the published weights that training starts with; not called where a checkpoint has given the weights."""
        return None

    def load_official(self, weights: dict[str, Tensor]) -> None:
        """Load a checkpoint of the official implementation, given as official names and tensors."""
        raise UserError(f"{type(self).__name__} has no importer of official checkpoints.")

    def load_pretrained(self, weights: dict[str, Tensor]) -> bool:
        """Initialise from a checkpoint of another task, loading the weights that match. False: not supported."""
        return False

    def check_head(self, task: str, head: str) -> None:
        """A head without trained weights must not be judged. Raises UserError.

        Args:
            task: what the head is for, as the message names it.
            head: its name in ``model``.
        """
        if not hasattr(self.model, head) or head in self.fresh_heads:
            raise UserError(
                f"the checkpoint has no trained head for '{task}' ({head}). Fine-tune it first "
                "(stages=[prepare,fit,evaluate,report] checkpoint=<file>), or evaluate the tasks it was trained on."
            )

    # ---- shared machinery ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        load = self.initial_weights()
        if stage == "fit" and load is not None and not self.loaded and self.trainer.ckpt_path is None:
            load()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.loaded = True
        return super().load_state_dict(*args, **kwargs)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        if self._step_begins:
            self._step_begins = False
            with torch.no_grad():
                self.before_forward()
        step = self.shared_step(batch, "train")
        total = self._weighted_total(step)
        self._note_losses(_losses_of(self.global_step, total, step, batch))
        for name in self._row:  # where training is told to stop, Lightning writes a row, and would repeat these numbers
            self.trainer.fit_loop._results.pop(f"training_step.{name}", None)
        self._row = []
        if self._row_is_due():
            row = self._mean_over_ranks(_named("train", step, total))
            self.log_dict(row, batch_size=len(batch[INDEX]))
            self._row = list(row)
        return total

    def _row_is_due(self) -> bool:
        """Whether the numbers of this step become a row of metrics, or those of an epoch's end, which callbacks may monitor.
        Those of other steps are not handed to Lightning, which takes a tenth of a millisecond and more for each number."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it by setattr
        return every > 0 and (self.global_step + 1) % every == 0 or self.trainer.is_last_batch

    def predict_step(self, batch: dict, batch_idx: int = 0) -> dict[str, Tensor]:
        """Rows of predictions and truths of a batch by name, (B, ...) each, ``INDEX`` among them.

        Raises:
            UserError: the losses of the batch are not finite.
        """
        step = self.shared_step(batch, "test")
        _check_finite([_losses_of(self.global_step, self._weighted_sum(step), step, batch)])
        return dict(step.outputs)

    def on_validation_epoch_start(self) -> None:
        self.read_losses()
        check_weights(self)
        self._held_out = HeldOut()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        step = self.shared_step(batch, "val")
        self._held_out.add(batch[INDEX], _named("val", step, self._weighted_sum(step)), step.outputs)

    def on_validation_epoch_end(self) -> None:
        """Log the losses and metrics of the whole split: the same values on every rank."""
        losses, rows = self._held_out.join()
        self._held_out = HeldOut()
        metrics = self.validation_metrics(rows) if rows else {}
        self.log_dict(losses | {f"val/{name}": value for name, value in metrics.items()})

    def _mean_over_ranks(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every value averaged over the ranks, by one exchange for all of them."""
        if self.trainer.world_size == 1:
            return values
        # A scale of shape (1,) counts as a scalar, too.
        joined = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        return dict(zip(values, self.trainer.strategy.reduce(joined, reduce_op="mean"), strict=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.read_losses()  # weights behind a loss that is not finite are not saved

    def on_train_end(self) -> None:
        self.read_losses()

    def batch_loss(self, batch: dict) -> Tensor:
        """The summed training loss of a batch, with nothing logged."""
        step = self.shared_step(batch, "train")
        total = self._weighted_total(step)
        _check_finite([_losses_of(self.global_step, total, step, batch)])
        return total

    def _weighted_total(self, step: StepOutput) -> Tensor:
        """The sum that is minimised."""
        unknown = self.loss_weights.keys() - step.losses.keys()  # held-out splits may lack terms that only training has
        if unknown:
            raise UserError(f"loss_weights names {sorted(unknown)}, but the loss has {sorted(step.losses)}.")
        return self._weighted_sum(step)

    def _weighted_sum(self, step: StepOutput) -> Tensor:
        return reduce(torch.add, [self.loss_weights.get(name, 1.0) * value for name, value in step.losses.items()])

    def _note_losses(self, losses: _Losses) -> None:
        """Check the losses of a training step: at once on a CPU. Another device would have to be waited for, so that the steps
        since the last row of metrics are checked together, and before a validation or a checkpoint."""
        self._unread.append(losses)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it by setattr
        if losses.total.device.type == "cpu" or len(self._unread) >= every:
            self.read_losses()

    def read_losses(self) -> None:
        """Raise LossNotFinite for the first training step, of those not read yet, whose loss is not finite."""
        unread, self._unread = self._unread, []
        _check_finite(unread)

    def configure_optimizers(self) -> Any:
        if self.optimizer_factory is None:
            raise UserError(f"{type(self).__name__} was built without an optimizer; choose one: optimizer=<name>.")
        optimizer = self.optimizer_factory(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        if self.scheduler_factory is None:
            return optimizer
        multipliers = [self.multiplier(group["lr"]) for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multipliers)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def multiplier(self, base_lr: float) -> Multiplier:
        """The scheduler's factor of ``base_lr`` at each optimiser step of the attached trainer."""
        return self.scheduler_factory(int(self.trainer.estimated_stepping_batches), self.steps_per_epoch(), base_lr)

    def steps_per_epoch(self) -> int:
        """Optimiser steps of one training epoch; the last one may accumulate fewer batches than the others."""
        self.trainer.fit_loop.setup_data()  # Lightning has not done so where ``max_steps`` alone limits the training
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Lightning refuses to clip beside a fused optimizer in every mixed precision. Only float16's gradients are scaled when
        they are clipped; :meth:`conflicts` refuses those."""
        precision = self.trainer.precision_plugin
        if getattr(precision, "scaler", None) is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            if gradient_clip_val and algorithm == GradClipAlgorithmType.NORM:
                clip_together_((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)
            else:
                Precision.clip_gradients(precision, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._step_begins = True
        with torch.no_grad():
            self.after_optimizer_step()


def outermost_called(module: nn.Module) -> list[nn.Module]:
    """The module itself if it can be called, else those below it that can; without parameters there is nothing to compile."""
    if next(module.parameters(), None) is None:
        return []
    if type(module).forward is not nn.Module.forward:
        return [module]
    return [part for child in module.children() for part in outermost_called(child)]


def _losses_of(number: int, total: Tensor, step: StepOutput, batch: dict) -> _Losses:
    return _Losses(number, total.detach(), {name: value.detach() for name, value in step.losses.items()}, batch[INDEX])


def _check_finite(steps: list[_Losses]) -> None:
    """Raise LossNotFinite for the first of the steps whose loss is not finite. Waits for the device once."""
    if not steps:
        return
    finite = torch.isfinite(torch.stack([losses.total.reshape(()) for losses in steps])).tolist()
    for losses, is_finite in zip(steps, finite, strict=True):
        if not is_finite:
            terms = ", ".join(f"{name}={float(value):g}" for name, value in losses.terms.items())
            ids = losses.rows.tolist()
            raise LossNotFinite(
                f"the loss is not finite at step {losses.step}: {terms}. Samples (rows of the split): "
                f"{ids[:16]}{' ...' if len(ids) > 16 else ''}. Look at these samples, lower optimizer.lr, or train in "
                "trainer.precision=32-true. The last checkpoint is untouched."
            )


def _named(split: str, step: StepOutput, total: Tensor) -> dict[str, Tensor]:
    """What a step logs, by name."""
    values = {f"{split}/loss": total.detach()}
    values |= {f"{split}/loss/{name}": value.detach() for name, value in step.losses.items()}
    return values | {f"{split}/{name}": value for name, value in step.report.items()}
