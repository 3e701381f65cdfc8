"""Image-text pairs in tar shards: one's own, downloaded, or simulated. Gives the splits and reads images for
encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import BaseDataModule
from datamodules.batch import IMAGE, INDEX, SKIPPED, Skipped
from datamodules.readers.tar_shards import TarShards
from models.errors import UserError

SPLITS = ("train", "val", "test")


class ImageTextDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`TarShards` after ``prepare_data(); setup()``.

    A root with a folder ``train/`` is split by its folders, ``val/`` and ``test/`` being optional. Otherwise all tars
    in the root are one pool, split by a hash of each sample's key: the same whatever the order of shards or samples.

    Args:
        root: folder of the dataset; the layout is shown when nothing is found there.
        simulate: writes a simulated set, ``simulate(root) -> folder``, used where ``root`` holds no dataset itself.
        val_fraction, test_fraction: shares of a pool; a split of share 0 is left out.
        caption_fields: fields of KEY.json that hold captions (a string or a list), after the lines of KEY.txt.
        index_dir: where indices of shards are kept, see :class:`TarShards`.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no dataset, an empty split, or more bad samples than allowed.
    """

    def __init__(
        self,
        root: str,
        simulate: Callable[[str], Path] | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        caption_fields: Sequence[str] = ("caption", "captions"),
        index_dir: str | None = None,
        seed: int = 0,
        num_workers: int = 2,
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise UserError(
                f"datamodule.val_fraction={val_fraction} and test_fraction={test_fraction} must not be negative and "
                "together leave something to train on (less than 1)."
            )
        self.root, self.simulate, self.caption_fields, self.index_dir = root, simulate, caption_fields, index_dir
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def prepare_data(self) -> None:
        """Write the simulated set where it is wanted and missing; runs in one process per machine."""
        self._folder()

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = self._folder()
        if (root / "train").is_dir():
            places = {split: {"split": split} for split in SPLITS if (root / split).is_dir()}
        else:
            test, val = self.test_fraction, self.test_fraction + self.val_fraction
            parts = {"train": (val, 1.0), "val": (test, val), "test": (0.0, test)}
            places = {split: {"part": part} for split, part in parts.items() if part[1] > part[0]}
        shared = {"caption_fields": self.caption_fields, "index_dir": self.index_dir}
        self.splits = {split: TarShards(str(root), **place, **shared) for split, place in places.items()}
        for split, dataset in self.splits.items():
            self.report_skipped(split, dataset.skipped)

    def image_loader(
        self,
        split: str,
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict]:
        """Batches of images for encoding, in the order of ``rows`` (default: all).

        Args:
            transform: ``PIL.Image -> (3, H, W)``; runs in the workers.
            rows: (N,) rows of the split to read, for instance those a feature store still lacks.

        Yields:
            INDEX (B,) int64, IMAGE (B, 3, H, W), and SKIPPED: the :class:`Skipped` rows of the batch, which are counted
            here and are absent from the other two. A batch may hold nothing but skipped rows.
        """
        dataset = self.splits[split]
        rows = np.arange(len(dataset)) if rows is None else np.asarray(rows)
        loader = DataLoader(
            _Images(dataset, transform),
            batch_size=None,
            sampler=np.array_split(rows, range(batch_size, len(rows), batch_size)) if len(rows) else [],
            num_workers=self.num_workers,
            collate_fn=_as_is,
        )
        for batch in loader:
            self.report_skipped(split, batch[SKIPPED])
            yield batch

    def _folder(self) -> Path:
        """Where the dataset lies: ``root``, or what ``simulate`` wrote below it."""
        root = Path(self.root)
        own = (root / "train").is_dir() or any(root.glob("*.tar"))
        return root if own or self.simulate is None else Path(self.simulate(self.root))


class _Images(Dataset):
    """``rows -> batch``: decodes and transforms a whole batch in one worker, so nothing is collated in the main
    process.
    """

    def __init__(self, dataset: TarShards, transform: Callable[[Image.Image], Tensor]):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: np.ndarray) -> dict:
        read = [(int(i), self.dataset.image_or_skipped(int(i))) for i in rows]
        images = [self.transform(image) for _, image in read if not isinstance(image, Skipped)]
        return {
            INDEX: torch.tensor([i for i, image in read if not isinstance(image, Skipped)], dtype=torch.int64),
            IMAGE: torch.stack(images) if images else torch.empty(0),
            SKIPPED: [image for _, image in read if isinstance(image, Skipped)],
        }


def _as_is(batch: dict) -> dict:
    return batch
