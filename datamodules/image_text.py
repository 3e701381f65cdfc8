"""Image-text pairs: in tar shards (one's own, downloaded, or simulated), or in any format that has a reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.base import BaseDataModule
from datamodules.readers.joined import Joined
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
        _check_fractions(val_fraction, test_fraction)
        self.root, self.simulate, self.caption_fields, self.index_dir = root, simulate, caption_fields, index_dir
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = self.folder()
        if (root / "train").is_dir():
            places = {split: {"split": split} for split in SPLITS if (root / split).is_dir()}
            others = sorted(folder.name for folder in root.iterdir() if folder.name not in SPLITS and any(folder.glob("*.tar")))
            if others:
                self.notes.append(f"FOLDERS NOT READ: {', '.join(others)} in {root}; splits are named train, val and test.")
        else:
            places = {split: {"part": part} for split, part in _shares(self.val_fraction, self.test_fraction).items()}
        shared = {"caption_fields": self.caption_fields, "index_dir": self.index_dir}
        self.splits = {split: TarShards(str(root), **place, **shared) for split, place in places.items()}
        for split, dataset in self.splits.items():
            self.report_skipped(split, dataset.skipped)

    def holds_data(self, root: Path) -> bool:
        return (root / "train").is_dir() or any(root.glob("*.tar"))


class ReaderDataModule(BaseDataModule):
    """Image-text pairs of any format: ``splits`` maps train, val and test to what their readers give.

    Args:
        train: a reader, ``() -> dataset`` (see :mod:`datamodules.readers.formats`), or several by name, whose rows follow
            one another.
        val, test: likewise; a split without a reader is drawn from ``train`` by a hash of each sample's path.
        root: folder of the dataset, which the readers' paths in the YAML refer to.
        val_fraction, test_fraction: shares of ``train`` that are drawn; a split of share 0 is left out.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no dataset, an empty split, or more bad samples than allowed.
    """

    def __init__(
        self,
        train: Callable[[], Any] | Mapping[str, Callable[[], Any]],
        val: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
        test: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
        root: str | None = None,
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        seed: int = 0,
        num_workers: int = 2,
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        _check_fractions(val_fraction, test_fraction)
        self.readers = {"train": train, "val": val, "test": test}
        self.root = root
        # A split that has a reader of its own is not drawn.
        self.val_fraction, self.test_fraction = (0.0 if val else val_fraction), (0.0 if test else test_fraction)

    @property
    def simulated(self) -> bool:
        return any(getattr(dataset, "simulated", False) for dataset in self.splits.values())

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        if self.root is not None and not Path(self.root).is_dir():
            raise UserError(f"no dataset at {self.root}: datamodule.root is the folder that holds annotations and images.")
        read = {split: _read(readers) for split, readers in self.readers.items() if readers}
        shares = _shares(self.val_fraction, self.test_fraction)
        drawn = {split: read["train"].part(*share) for split, share in shares.items()} if len(shares) > 1 else {}
        found = read | drawn
        self.splits = {split: found[split] for split in SPLITS if split in found}
        for split, dataset in self.splits.items():
            self.report_skipped(split, dataset.skipped)


def _read(readers: Callable[[], Any] | Mapping[str, Callable[[], Any]]) -> Any:
    if callable(readers):
        return readers()
    return Joined([reader() for reader in readers.values()])


def _check_fractions(val: float, test: float) -> None:
    if min(val, test) < 0 or val + test >= 1:
        raise UserError(
            f"datamodule.val_fraction={val} and test_fraction={test} must not be negative and together leave something to "
            "train on (less than 1)."
        )


def _shares(val: float, test: float) -> dict[str, tuple[float, float]]:
    """[low, high) of the samples that each drawn split gets."""
    parts = {"train": (test + val, 1.0), "val": (test, test + val), "test": (0.0, test)}
    return {split: part for split, part in parts.items() if part[1] > part[0]}
