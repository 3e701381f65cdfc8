"""What held-out batches give, joined over batches and processes: the losses of each batch and the rows of predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import INDEX
from models.errors import UserError
from models.sharded import local

PADDING = -100  # of integer rows that are shorter than others: the label that metrics ignore


class HeldOut:
    """Collects one pass over a held-out split, on the CPU.

    Every process sees whole batches of the order that one process has, and some of them a batch that another one has seen
    too. Each batch and each row counts once, whoever saw it.
    """

    def __init__(self):
        self.losses: dict[int, tuple[int, dict[str, float]]] = {}  # first row of a batch -> its size and its losses
        self.parts: list[dict[str, Tensor]] = []

    def add(self, index: Tensor, losses: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        """Keep a batch.

        Args:
            index: (B,) global rows of the samples.
            losses: scalars of the batch by name.
            rows: predictions and truths by name, (B, ...), ``INDEX`` among them; may be empty.
        """
        self.losses[int(index.min())] = len(index), {name: float(value) for name, value in losses.items()}
        if rows:
            self.parts.append(on_cpu(rows))

    def join(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The mean of each loss over the samples of all processes, and all rows in the order of the split.

        Raises:
            UserError: a loss or a prediction is not finite; on all processes alike, so that none waits for another.
        """
        losses, parts = dict(self.losses), list(self.parts)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, (losses, parts))
            losses = {first: batch for of_rank, _ in gathered for first, batch in of_rank.items()}
            parts = [part for _, of_rank in gathered for part in of_rank]
        return mean_losses(losses), join_rows(parts) if parts else {}


def mean_losses(batches: Mapping[int, tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The mean over samples of the losses of batches, summed in the order of the split so that ranks do not matter."""
    bad = [first for first, (_, losses) in sorted(batches.items()) if not all(map(math.isfinite, losses.values()))]
    if bad:
        raise UserError(
            f"losses of {len(bad)} of {len(batches)} held-out batches are not finite; these batches begin with the rows "
            f"{bad[:16]} of the split. Look at their samples, lower optimizer.lr, or train in trainer.precision=32-true."
        )
    sums: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for first in sorted(batches):
        size, losses = batches[first]
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + size * value
            sizes[name] = sizes.get(name, 0) + size
    return {name: total / sizes[name] for name, total in sums.items()}


def on_cpu(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows on the CPU, floating point as float32."""
    return {name: (x.float() if x.is_floating_point() else x).detach().cpu() for name, x in rows.items()}


def join_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several batches in the order of the split, each ``INDEX`` once.

    Where batches differ in the second dimension (captions padded to the longest of a batch), integers are filled up with
    ``PADDING``. Raises UserError for a prediction that is not finite.
    """
    rows = {name: torch.cat(_same_width([part[name] for part in parts])) for name in parts[0]}
    index, order = rows[INDEX].sort(stable=True)
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    rows = {name: value[order[first]] for name, value in rows.items()}
    check_finite(rows)
    return rows


def _same_width(values: list[Tensor]) -> list[Tensor]:
    if values[0].dim() < 2 or len({value.shape[1] for value in values}) == 1:
        return values
    width = max(value.shape[1] for value in values)
    padding = 0 if values[0].is_floating_point() else PADDING
    return [F.pad(value, (0, 0) * (value.dim() - 2) + (0, width - value.shape[1]), value=padding) for value in values]


def check_finite(rows: Mapping[str, Tensor]) -> None:
    """Raise UserError if a prediction is NaN or infinite: a table of such numbers would mean nothing."""
    for name, value in rows.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = (~torch.isfinite(value)).reshape(len(value), -1).any(dim=1)
            raise UserError(
                f"the prediction '{name}' is not finite for {int(bad.sum())} of {len(bad)} samples; rows of the split: "
                f"{rows[INDEX][bad][:16].tolist()}. Look at these samples, or use an earlier checkpoint or "
                "trainer.precision=32-true."
            )


def check_weights(module: nn.Module) -> None:
    """Raise UserError if a parameter is NaN or infinite.

    Minus infinity is a gate that is closed for good (STRUCTURE's released head). Buffers may hold infinities: masks, for
    example.
    """
    bad = [name for name, value in module.named_parameters() if not bool((local(value) < torch.inf).all())]
    if bad:
        raise UserError(
            f"{len(bad)} weights are not finite, the first is {bad[0]}: the training diverged or the checkpoint is damaged. "
            "Use an earlier checkpoint, or train with a lower optimizer.lr."
        )
