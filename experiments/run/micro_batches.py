"""``micro_batch_size=N``: networks run over N samples at a time, and the losses still see the whole batch.

Only the outputs of a piece are kept; the backward pass computes one piece at a time again. The gradients are those of the whole
batch, as with the cached gradients of L. Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", arXiv 2101.06983.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lightning_modules.base import BaseModule, RowWise
from models.errors import UserError


class MicroBatches:
    """Cuts the batches of a module's networks into pieces.

    Args:
        size: rows of a piece; the last one of a batch may have fewer.

    Attributes:
        cut: whether any batch with gradients had more rows than one piece.
    """

    def __init__(self, size: int):
        self.size, self.cut = size, False

    def install(self, module: BaseModule) -> None:
        """Replace the methods that ``module`` names by such that run piece by piece.

        Raises:
            UserError: there are none, or one has batch normalisation.
        """
        parts = module.row_wise()
        if not parts:
            raise UserError(
                f"micro_batch_size: every loss of {type(module).__name__} belongs to a single sample. Set a smaller "
                "datamodule.batch_size and trainer.accumulate_grad_batches instead."
            )
        for part in parts:
            _check_statistics(part.module)
            _replace(part, self._over_groups if part.groups else self._over_pieces)

    def _over_groups(self, function: Callable[..., list], *groups: Sequence) -> list:
        """A function of lists whose entries have their own numbers of rows: one entry after the other."""

        def of_one(*entries: Any) -> Any:
            return function(*([entry] for entry in entries))[0]

        return [self._over_pieces(of_one, *entries) for entries in zip(*groups, strict=True)]

    def _over_pieces(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        values, structure = tree_flatten((args, kwargs))
        rows = next(len(value) for value in values if isinstance(value, Tensor))
        if rows <= self.size:
            return function(*args, **kwargs)
        self.cut = self.cut or torch.is_grad_enabled()
        count = math.ceil(rows / self.size)
        pieces = [value.split(self.size) if isinstance(value, Tensor) else [value] * count for value in values]
        outputs = []
        for piece in zip(*pieces, strict=True):
            piece_args, piece_kwargs = tree_unflatten(piece, structure)
            if torch.is_grad_enabled():
                outputs.append(checkpoint(function, *piece_args, use_reentrant=False, **piece_kwargs))
            else:
                outputs.append(function(*piece_args, **piece_kwargs))
        return _joined(outputs)


def _replace(part: RowWise, run: Callable) -> None:
    function = getattr(type(part.module), part.method)

    def in_pieces(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(partial(function, module), *args, **kwargs)

    # A method of the module, so that a deep copy runs its own weights.
    setattr(part.module, part.method, MethodType(in_pieces, part.module))


def _joined(outputs: Sequence) -> Any:
    """The outputs of the pieces as one: tensors joined along their rows, anything else as it is in the first."""
    values, structures = zip(*map(tree_flatten, outputs), strict=True)
    joined = [torch.cat(pieces) if isinstance(pieces[0], Tensor) else pieces[0] for pieces in zip(*values, strict=True)]
    return tree_unflatten(joined, structures[0])


def _check_statistics(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"micro_batch_size: '{name}' of {type(module).__name__} is batch normalisation, whose statistics would be "
                "those of a piece. Set micro_batch_size=null, or choose a network without it."
            )
