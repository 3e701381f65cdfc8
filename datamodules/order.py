"""The order of training: a pure function of (seed, epoch, position). Workers and ranks only slice it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class BatchOrder:
    """Batches of row numbers for one rank; iterating gives one epoch, from ``start`` on.

    Args:
        rows: the rows to draw from (n,).
        batch_size: per rank; all ranks together see ``batch_size * world_size`` rows per step.
        seed: of the shuffle.
        shuffle: False keeps the order of ``rows`` and the last, smaller batch.
        rank, world_size: this rank's slice.
    """

    def __init__(
        self, rows: np.ndarray, batch_size: int, seed: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1
    ):
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        whole = self.batch_size * self.world_size
        return len(self.rows) // whole if self.shuffle else -(-len(self.rows) // whole)

    def permutation(self, epoch: int) -> np.ndarray:
        """All rows in the order of one epoch."""
        if not self.shuffle:
            return self.rows
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        order, whole = self.permutation(self.epoch), self.batch_size * self.world_size
        for batch in range(self.start, len(self)):
            rows = order[batch * whole : (batch + 1) * whole]
            share = -(-len(rows) // self.world_size)
            yield rows[self.rank * share : (self.rank + 1) * share]
        self.start = 0
