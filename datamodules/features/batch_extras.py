"""What STRUCTURE's training can add to batches of frozen features: FuseMix, and samples that only the regulariser sees.

Each is a dataset around a dataset, ``dataset[BatchRequest] -> batch``, and a pure function of (seed, epoch, rows), so that
a resumed run repeats it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.order import BatchRequest, epoch_order
from models.alignment import batch as keys
from models.errors import UserError

_MIX, _FIXED = 1, 2  # keep the two draws of a seed and an epoch apart
RAGGED = (keys.TEXT_TOKENS, keys.EXTRA_TEXT_TOKENS)


class FuseMix(Dataset):
    """Mixes each pair with another one, both modalities by the same share (FuseMix, arXiv 2312.10144; STRUCTURE's
    ``mixup_alpha``): ``share * x + (1 - share) * partner``, one share of Beta(alpha, alpha) for a batch.

    The partner stands half a batch earlier in the epoch's order, which is taken as a ring.

    Args:
        batches: the dataset of ``len`` pairs whose floating-point features are mixed. ``INDEX`` stays that of the pair.
        batch_size: pairs of one step, on all devices together; of whole batches alone.
        alpha: positive; small values leave most pairs nearly as they are.
    """

    def __init__(self, batches: Any, batch_size: int, alpha: float):
        if not alpha > 0:
            raise UserError(f"features.mixup_alpha={alpha} must be positive; 0 mixes nothing.")
        self.batches, self.batch_size, self.alpha = batches, batch_size, alpha
        self._kept: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        order, place = self._order_and_places(request.seed, request.epoch)
        rows = np.sort(request.rows)  # as the features come
        number = place[rows[0]] // self.batch_size
        share = float(np.random.default_rng((request.seed, request.epoch, number, _MIX)).beta(self.alpha, self.alpha))
        partners = order[(place[rows] - self.batch_size // 2) % len(order)]
        batch, other = self.batches[request], self.batches[request._replace(rows=partners)]
        back = torch.from_numpy(np.argsort(np.argsort(partners)))  # partners come sorted, too
        for name, value in batch.items():
            if name in RAGGED:
                raise UserError(f"features.mixup_alpha mixes vectors; captions of unlike lengths ({name}) cannot be mixed.")
            if torch.is_tensor(value) and value.is_floating_point():
                batch[name] = (share * value.float() + (1 - share) * other[name][back].float()).to(value.dtype)
        return batch

    def _order_and_places(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order and where in it each pair stands, kept for the epoch."""
        if self._kept is None or self._kept[0] != (seed, epoch):
            order = epoch_order(len(self), seed, epoch)
            place = np.empty_like(order)
            place[order] = np.arange(len(order))
            self._kept = (seed, epoch), order, place
        return self._kept[1:]


class Unpaired(Dataset):
    """Adds to every batch the same images and captions of no pair, for the regulariser alone (STRUCTURE's extra unimodal
    samples).

    Args:
        images: (m, Dv) frozen features, or None.
        texts: (n, Dt) frozen features, or None.
    """

    def __init__(self, batches: Any, images: torch.Tensor | None = None, texts: torch.Tensor | None = None):
        extra = {keys.STRUCTURE_IMAGE: images, keys.STRUCTURE_TEXT: texts}
        self.batches, self.extra = batches, {name: value for name, value in extra.items() if value is not None}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        return self.batches[request] | self.extra


class FixedStructure(Dataset):
    """Adds to every batch of an epoch the same pairs of its first batch, for the regulariser alone; with
    ``regulariser.extra=replace`` this is STRUCTURE's ablation ``fixed_structure``.

    Args:
        batch_size: pairs of one step, on all devices together.
        count: how many pairs are drawn of the first batch.
    """

    def __init__(self, batches: Any, batch_size: int, count: int):
        if not 1 < count <= batch_size:
            raise UserError(f"features.fixed_structure={count} must lie between 2 and the batch's {batch_size} pairs.")
        self.batches, self.batch_size, self.count = batches, batch_size, count
        self._kept: tuple[tuple[int, int], dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        if self._kept is None or self._kept[0] != (request.seed, request.epoch):
            self._kept = (request.seed, request.epoch), self._fixed(request)
        return self.batches[request] | self._kept[1]

    def _fixed(self, request: BatchRequest) -> dict[str, Any]:
        """The epoch's fixed pairs, read once."""
        first = epoch_order(len(self), request.seed, request.epoch)[: self.batch_size]
        rows = np.random.default_rng((request.seed, request.epoch, _FIXED)).choice(first, self.count, replace=False)
        fixed = self.batches[request._replace(rows=rows)]
        missing = {keys.IMAGE_FEATURES, keys.TEXT_FEATURES} - fixed.keys()
        if missing:
            raise UserError(f"features.fixed_structure needs pooled features or one layer, and there are no {sorted(missing)}.")
        return {keys.STRUCTURE_IMAGE: fixed[keys.IMAGE_FEATURES], keys.STRUCTURE_TEXT: fixed[keys.TEXT_FEATURES]}
