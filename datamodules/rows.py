"""The one way in which samples become batches: read row by row, skip what cannot be read, collate the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample
from models.batch import INDEX, SKIPPED, Skipped

TRIES = 100  # rows that are tried in place of the unreadable ones of a batch
EVALUATION = 2**31  # the "epoch" of what evaluation draws


class RowDataset(Dataset):
    """``dataset[BatchRequest] -> batch``. A family implements :meth:`key`, :meth:`read` and :meth:`collate`.

    Rows that cannot be read are listed in SKIPPED and are not in the batch. In training the next readable row takes their
    place, so that batches have the same size on every rank. In evaluation a batch is smaller then; only a batch that would be
    empty gets the next readable row, which the metrics count once. A batch without any sample has an empty INDEX and nothing
    else; the datamodule then stops the run.

    Attributes:
        training: whether samples are augmented and bad ones replaced.
    """

    training = False

    def __len__(self) -> int:
        raise NotImplementedError

    def key(self, row: int) -> str:
        """Name of a row on disk."""
        raise NotImplementedError

    def read(self, row: int, rng: np.random.Generator) -> Any:
        """One sample; every random choice comes from ``rng``. Raises BadSample."""
        raise NotImplementedError

    def collate(self, rows: list[int], samples: list[Any], request: BatchRequest) -> dict[str, Any]:
        """The batch of at least one sample, without INDEX and SKIPPED."""
        raise NotImplementedError

    def rng(self, request: BatchRequest, row: int, *purpose: int) -> np.random.Generator:
        """A generator that is a pure function of (seed, epoch, row) and of what it is for."""
        epoch = request.epoch if self.training else EVALUATION
        return np.random.default_rng((request.seed, epoch, row, *purpose))

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        return self.batch(request, replace=True)

    def batch(self, request: BatchRequest, replace: bool = False) -> dict[str, Any]:
        """The batch of a request; without ``replace`` of its own rows alone, also where none of them can be read."""
        rows, samples, skipped = self._read_rows(request, replace)
        batch = self.collate(rows, samples, request) if rows else {}
        return {**batch, INDEX: torch.tensor(rows, dtype=torch.int64), SKIPPED: skipped}

    def _read_rows(self, request: BatchRequest, replace: bool) -> tuple[list[int], list[Any], list[Skipped]]:
        """Rows of the batch, their samples, and what was skipped."""
        rows, samples, skipped = [], [], []
        requested = np.asarray(request.rows).tolist()
        tried, tries = set(requested), TRIES if replace else 0
        for position, row in enumerate(requested):
            while True:
                try:
                    samples.append(self.read(row, self.rng(request, row)))
                    rows.append(row)
                    break
                except BadSample as error:
                    skipped.append(Skipped(row, self.key(row), str(error)))
                would_be_empty = not rows and position == len(requested) - 1
                if tries == 0 or len(tried) >= len(self) or not (self.training or would_be_empty):
                    break
                while row in tried:
                    row = (row + 1) % len(self)
                tries -= 1
                tried.add(row)
        return rows, samples, skipped


def as_is(batch: Any) -> Any:
    """``collate_fn`` of a DataLoader whose dataset gives whole batches."""
    return batch


def padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays (n_i, ...) stacked to (B, max n_i, ...), zeros behind the shorter ones."""
    longest = max(len(array) for array in arrays)
    return np.stack([np.pad(array, [(0, longest - len(array))] + [(0, 0)] * (array.ndim - 1)) for array in arrays])
