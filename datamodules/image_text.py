"""Image-text pairs in tar shards: one's own, downloaded, or simulated. Gives the splits and reads images for
encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from datamodules.base import BaseDataModule
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

    def _folder(self) -> Path:
        """Where the dataset lies: ``root``, or what ``simulate`` wrote below it."""
        root = Path(self.root)
        own = (root / "train").is_dir() or any(root.glob("*.tar"))
        return root if own or self.simulate is None else Path(self.simulate(self.root))
