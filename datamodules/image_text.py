"""Image-text pairs with splits: the shared datamodule of every method that reads images with captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.base import BaseDataModule
from datamodules.batch import IMAGE, INDEX, Skipped
from datamodules.readers.tar_shards import LAYOUT, TarShards
from datamodules.simulated.shards import SceneShards
from models.errors import UserError

SPLITS = ("train", "val", "test")


class ImageTextDataModule(BaseDataModule):
    """Tar shards of image-caption pairs as img2dataset writes them.

    With folders ``train/``, ``val/``, ``test/`` below ``root`` these are the splits (``val`` and ``test`` may be missing).
    Otherwise all tars of ``root`` are one pool, and each sample's split follows from a hash of its key.

    Args:
        root: folder of the dataset.
        simulate: writes a simulated set at ``root`` when there is none.
        caption_fields: fields of KEY.json that hold captions (a string or a list), after the lines of KEY.txt.
        val_fraction, test_fraction: shares drawn from a pool without split folders.
        limit: use at most this many samples per split.
        num_workers: processes that decode images while encoding.
        max_skipped: see :class:`BaseDataModule`.
    """

    def __init__(
        self,
        root: str,
        simulate: SceneShards | None = None,
        caption_fields: Sequence[str] = ("caption", "captions"),
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        limit: int | None = None,
        num_workers: int = 1,
        max_skipped: float = 0.1,
    ):
        super().__init__(max_skipped)
        self.root, self.simulate, self.caption_fields = Path(root), simulate, tuple(caption_fields)
        if not 0 <= val_fraction + test_fraction < 1:
            raise UserError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave no training data.")
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.limit, self.num_workers = limit, num_workers
        self.splits: dict[str, Any] = {}

    def prepare_data(self) -> None:
        if self.simulate is not None:
            if self.limit is not None:
                self.root = self.root.with_name(f"{self.root.name}-limit{self.limit}")
            if not self.root.is_dir():
                self.simulate.write(self.root, self.limit)
        if not self.root.is_dir():
            raise UserError(f"no dataset at {self.root}. Put it there like this:\n{LAYOUT.format(root=self.root)}")

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        if (self.root / "train").is_dir():
            found = [split for split in SPLITS if (self.root / split).is_dir()]
            datasets = {split: TarShards(str(self.root), split, caption_fields=self.caption_fields) for split in found}
        else:
            cuts = np.cumsum([0, 1 - self.val_fraction - self.test_fraction, self.val_fraction, self.test_fraction])
            ranges = {split: (float(cuts[i]), float(cuts[i + 1])) for i, split in enumerate(SPLITS)}
            ranges = {split: span for split, span in ranges.items() if span[1] > span[0]}
            datasets = {
                split: TarShards(str(self.root), hash_range=span, caption_fields=self.caption_fields)
                for split, span in ranges.items()
            }
        for split, dataset in datasets.items():
            if self.limit is not None:
                dataset.truncate(self.limit)
            for skipped in dataset.skipped:
                self.record_skipped(split, skipped, len(dataset) + len(dataset.skipped))
        self.splits = datasets

    def image_loader(
        self, split: str, transform: Callable[[Image.Image], torch.Tensor], batch_size: int, rows: np.ndarray | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Batches {INDEX (B,), IMAGE (B, 3, H, W)} of the rows (all by default), in order; unusable images are recorded."""
        dataset = self.splits[split]
        view: Dataset = _Images(dataset, transform)
        if rows is not None:
            view = Subset(view, [int(row) for row in rows])
        # Spawned, not forked: torch's threads do not survive a fork. A handful of images is not worth a process.
        workers = self.num_workers if len(view) > 4 * batch_size else 0
        context = "spawn" if workers else None
        loader = DataLoader(view, batch_size, num_workers=workers, collate_fn=_collate, multiprocessing_context=context)
        for batch in loader:
            for skipped in batch.pop("skipped"):
                self.record_skipped(split, skipped, len(dataset))
            yield batch


class _Images(Dataset):
    def __init__(self, dataset: TarShards, transform: Callable[[Image.Image], torch.Tensor]):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor] | Skipped:
        image = self.dataset.image_or_skipped(i)
        return image if isinstance(image, Skipped) else (i, self.transform(image))


def _collate(samples: list) -> dict[str, Any]:
    good = [sample for sample in samples if not isinstance(sample, Skipped)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0, 3, 1, 1)
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    return {INDEX: torch.tensor([i for i, _ in good], dtype=torch.int64), IMAGE: images, "skipped": skipped}
