"""The order in which samples are trained on: a pure function of (seed, epoch, batch, rank), never of workers or
luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import SequentialSampler


class BatchRequest(NamedTuple):
    """What a dataset gets as its "index" when batches are fetched whole.

    ``rows``: (B,) int64 rows to fetch. ``epoch`` and ``seed`` let the dataset draw augmentations and captions as a pure
    function of (seed, epoch, row).
    """

    rows: np.ndarray
    epoch: int
    seed: int


class OrderedBatches(SequentialSampler):
    """Yields a :class:`BatchRequest` per batch. Batch b of rank r is a slice of the epoch's order.

    Use as ``DataLoader(dataset, sampler=OrderedBatches(...), batch_size=None)``. ``len`` is the number of batches of
    a whole epoch, also when the first one starts inside.

    With ``drop_last`` the samples beyond the last whole batch are left out of this epoch (other ones in the next).
    Without it the last batch of all ranks is smaller; where it does not divide evenly, the ranks that lack a sample
    repeat one from the start, so that all ranks take the same number of steps of the same size.

    Args:
        size: number of samples.
        batch_size: samples per rank.
        shuffle: False keeps the order 0 ... size-1 in every epoch.
        seed: together with the epoch it decides on the order.
        drop_last: see above. With fewer than ``batch_size * world_size`` samples there is no batch at all.
        rank, world_size: this process and how many share each batch.
        position: asked at every ``iter()`` for (epoch, first batch of it). Not Lightning's ``set_epoch``: the loader is
            iterated before that call, and after a stop inside an epoch Lightning counts the epoch as a whole one.
    """

    # A SequentialSampler only in name: Lightning's overfit_batches replaces samplers that are not.

    def __init__(
        self,
        size: int,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ):
        self.size, self.batch_size, self.shuffle, self.seed, self.drop_last = size, batch_size, shuffle, seed, drop_last
        self.rank, self.world_size, self.position = rank, world_size, position

    def __len__(self) -> int:
        together = self.batch_size * self.world_size
        return self.size // together if self.drop_last else -(-self.size // together)

    def __iter__(self) -> Iterator[BatchRequest]:
        return self._batches(*self.position())  # not itself a generator: the position is that at iter()

    def _batches(self, epoch: int, start: int) -> Iterator[BatchRequest]:
        order = epoch_order(self.size, self.seed, epoch) if self.shuffle else np.arange(self.size)
        together = self.batch_size * self.world_size
        for batch in range(start, len(self)):
            rows = order[batch * together : (batch + 1) * together]
            share = -(-len(rows) // self.world_size)
            rows = np.resize(rows, share * self.world_size)  # repeats from the start where the last batch is uneven
            yield BatchRequest(rows[self.rank * share : (self.rank + 1) * share], epoch, self.seed)


class HeldOutBatches(SequentialSampler):
    """Yields a :class:`BatchRequest` per batch of a held-out split, in the order of its rows, the last one smaller.

    Batch b goes whole to rank ``b % world_size``, so that every batch is one that a single process would see. Ranks without a
    batch in the last round repeat the last one: all ranks take the same number of steps, and whoever collects drops repeats.

    Args:
        size: number of samples.
        batch_size: samples of a batch.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size
        self.batches = -(-size // batch_size)

    def __len__(self) -> int:
        return -(-self.batches // self.world_size)

    def __iter__(self) -> Iterator[BatchRequest]:
        for step in range(len(self)):
            batch = min(step * self.world_size + self.rank, self.batches - 1)
            yield BatchRequest(np.arange(batch * self.batch_size, min((batch + 1) * self.batch_size, self.size)), 0, 0)


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """(size,) int64 permutation that depends on its arguments alone."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def draw(choices: np.ndarray, rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """(B,) int64: for every row a number below its ``choices``, a pure function of (seed, epoch, row).

    SplitMix64's finaliser over the three numbers: independent of which rows share a batch, unlike a generator's stream.
    """
    with np.errstate(over="ignore"):
        start = _mix(_mix(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(epoch))
        bits = _mix(rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start)
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 * choices).astype(np.int64)


def _mix(bits: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
