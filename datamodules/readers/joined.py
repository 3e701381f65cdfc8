"""Several datasets of image-text pairs as one."""

from __future__ import annotations

import numpy as np
from PIL import Image

from datamodules.readers.base import ImageTextDataset
from models.batch import Skipped
from models.errors import UserError
from models.io import stable_hash


class Joined:
    """The rows of ``datasets``, one after the other; itself a :class:`~datamodules.readers.base.ImageTextDataset`.

    Raises:
        UserError: they name different classes.
    """

    pre_encoded = False

    def __init__(self, datasets: list[ImageTextDataset]):
        self.datasets = datasets
        self._starts = np.cumsum([0, *map(len, datasets)])
        names = [dataset.class_names for dataset in datasets if dataset.class_names]
        if any(other != names[0] for other in names):
            raise UserError(f"the joined datasets have different classes: {names[0][:3]}…, {names[1][:3]}…")
        self.class_names = names[0] if names else None
        self.fingerprint = stable_hash([dataset.fingerprint for dataset in datasets])
        self.skipped: list[Skipped] = [entry for dataset in datasets for entry in dataset.skipped]

    def part(self, low: float, high: float) -> Joined:
        """The share [low, high) of each dataset."""
        return Joined([dataset.part(low, high) for dataset in self.datasets])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def caption_counts(self) -> np.ndarray:
        return np.concatenate([dataset.caption_counts for dataset in self.datasets])

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([dataset.labels for dataset in self.datasets])

    def key(self, i: int) -> str:
        dataset, row = self._at(i)
        return dataset.key(row)

    def captions(self, i: int) -> list[str]:
        dataset, row = self._at(i)
        return dataset.captions(row)

    def image(self, i: int) -> Image.Image:
        dataset, row = self._at(i)
        return dataset.image(row)

    def _at(self, i: int) -> tuple[ImageTextDataset, int]:
        which = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.datasets[which], int(i - self._starts[which])
