"""What every datamodule shares: the one way to skip a bad sample, and an order that survives a restart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytorch_lightning as pl

from datamodules.batch import Skipped
from datamodules.order import BatchOrder
from models.errors import UserError

LISTED = 100  # how many skipped samples are named in the report; all are counted


class TooManySkipped(UserError):
    """So many samples are unusable that the data, not a sample, is at fault."""


class BaseDataModule(pl.LightningDataModule):
    """Counts, lists and bounds skipped samples, and resumes the order of training at the right batch.

    Args:
        max_skipped: the largest share of unusable samples that is taken for bad luck; more is an error.
    """

    def __init__(self, max_skipped: float = 0.1):
        super().__init__()
        self.max_skipped = max_skipped
        self._skipped: dict[tuple[str, str], Skipped] = {}
        self.order: BatchOrder | None = None

    # ---- skipped samples ----------------------------------------------------------------------------------------

    def record_skipped(self, split: str, skipped: Skipped, total: int) -> None:
        """Count one unusable sample of a split with ``total`` samples. Raises TooManySkipped beyond the bound."""
        self._skipped[split, f"{skipped.key}|{skipped.reason}"] = skipped
        count = sum(1 for name, _ in self._skipped if name == split)
        if count > max(self.max_skipped * total, 10):
            reasons = "\n".join(f"  {s.key}: {s.reason}" for s in list(self._skipped.values())[:5])
            raise TooManySkipped(
                f"{count} of {total} samples of the split '{split}' cannot be used, e.g.\n{reasons}\n"
                "Mend the data, or raise datamodule.max_skipped to go on without them."
            )

    def skip_report(self) -> dict[str, Any]:
        """{'total', 'reasons': {reason: count}, 'samples': [...]} of everything skipped so far."""
        reasons = Counter(s.reason.split(":")[0] for s in self._skipped.values())
        samples = [{"split": split, "key": s.key, "reason": s.reason} for (split, _), s in self._skipped.items()]
        return {"total": len(samples), "reasons": dict(reasons), "samples": samples[:LISTED]}

    # ---- order --------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What the data decides for the model, by name of the module's argument."""
        return {}

    def state_dict(self) -> dict[str, int]:
        """The place in the order after the last finished optimiser step; prefetched batches do not count."""
        if self.trainer is None or self.order is None:
            return {}
        epoch, batch = divmod(self._batches_done(), max(len(self.order), 1))
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume_at = state

    def _batches_done(self) -> int:
        return self.trainer.global_step * self.trainer.accumulate_grad_batches

    def start_epoch(self, order: BatchOrder) -> BatchOrder:
        """Set the order to the trainer's epoch and, once after a restart, to the first batch not trained on yet."""
        self.order = order
        order.epoch = self.trainer.current_epoch if self.trainer else 0
        resume = self.__dict__.pop("_resume_at", None)
        if resume:
            order.epoch, order.start = resume["epoch"], resume["batch"]
        return order
