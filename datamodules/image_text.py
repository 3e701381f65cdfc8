"""Image-text pairs: in tar shards (one's own, downloaded, or simulated), or in any format that has a reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.base import BaseDataModule
from datamodules.readers.base import ImageTextDataset
from datamodules.readers.joined import Joined
from datamodules.readers.tar_shards import TarShards
from models.errors import UserError

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # of folders and shards

Reader = Callable[[], ImageTextDataset]
Readers = Reader | Mapping[str, Reader]


class ImageTextDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`TarShards` after ``prepare_data(); setup()``.

    A root with a folder ``train/`` is split by its folders, ``val/`` and ``test/`` being optional. Otherwise tars named
    ``train-*``, ``val-*`` and ``test-*`` are split by these names. Otherwise all tars in the root are one pool, split by a hash
    of each sample's key: the same whatever the order of shards or samples.

    Args:
        root: folder of the dataset; the layout is shown when nothing is found there.
        simulate: writes a simulated set, ``simulate(root) -> folder``, used where ``root`` holds no dataset itself.
        val_fraction: share of a pool that becomes the split val; 0 for none.
        test_fraction: share of a pool that becomes the split test; 0 for none.
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
        num_workers: int | Literal["auto"] = "auto",
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
        places = self._places(root)
        shared: dict[str, Any] = {"caption_fields": self.caption_fields, "index_dir": self.index_dir}
        self.splits = {split: TarShards(str(root), **place, **shared) for split, place in places.items()}
        for split, dataset in self.splits.items():
            self.report_skipped(split, dataset.skipped)

    def _places(self, root: Path) -> dict[str, dict[str, Any]]:
        """Arguments of :class:`TarShards` for each split."""
        folders = _named(SPLIT_NAMES, lambda name: (root / name).is_dir())
        if "train" in folders:
            read = set(folders.values())
            others = sorted(folder.name for folder in root.iterdir() if folder.name not in read and any(folder.glob("*.tar")))
            if others:
                self.notes.append(f"FOLDERS NOT READ: {', '.join(others)} in {root}; splits are named train, val and test.")
            return {split: {"split": name} for split, name in folders.items()}
        files = sorted(file.name for file in root.glob("*.tar"))
        prefixes = _named(SPLIT_NAMES, lambda name: any(_begins(file, name) for file in files))
        if "train" in prefixes and len(prefixes) > 1:
            if other := [file for file in files if not any(_begins(file, name) for name in prefixes.values())]:
                self.notes.append(f"NOT USED: {len(other)} tars of {root} belong to no split by their names, e.g. {other[0]}.")
            return {split: {"prefix": name} for split, name in prefixes.items()}
        return {split: {"part": part} for split, part in _shares(self.val_fraction, self.test_fraction).items()}

    def holds_data(self, root: Path) -> bool:
        return (root / "train").is_dir() or any(root.glob("*.tar"))


class ReaderDataModule(BaseDataModule):
    """Image-text pairs of any format: ``splits`` maps train, val and test to what their readers give.

    Args:
        train: a reader, ``() -> dataset`` (see :mod:`datamodules.readers.formats`), or several by name, whose rows follow
            one another.
        val: likewise; without a reader it is drawn from ``train`` by a hash of each sample's path.
        test: likewise.
        root: folder of the dataset, which the readers' paths in the YAML refer to.
        val_fraction: share of ``train`` that is drawn for val; 0 for none.
        test_fraction: share of ``train`` that is drawn for test; 0 for none.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no dataset, an empty split, or more bad samples than allowed.
    """

    def __init__(
        self,
        train: Readers,
        val: Readers | None = None,
        test: Readers | None = None,
        root: str | None = None,
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
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
        datasets = read | drawn
        check_class_names(datasets)
        self.splits = {split: datasets[split] for split in SPLITS if split in datasets}
        for split, dataset in self.splits.items():
            self.report_skipped(split, dataset.skipped)


def _named(names: Mapping[str, Sequence[str]], exists: Callable[[str], bool]) -> dict[str, str]:
    """The first name of each split that exists."""
    present = {split: next(filter(exists, choices), None) for split, choices in names.items()}
    return {split: name for split, name in present.items() if name is not None}


def _begins(file: str, name: str) -> bool:
    return file.startswith(name) and not file[len(name)].isalpha()


def _read(readers: Readers) -> ImageTextDataset:
    if callable(readers):
        return readers()
    return Joined([reader() for reader in readers.values()])


def check_class_names(datasets: Mapping[str, ImageTextDataset]) -> None:
    """Raises UserError unless a number means the same class in every split."""
    names = {split: dataset.class_names for split, dataset in datasets.items() if dataset.class_names}
    first = next(iter(names), None)
    for split, other in names.items():
        if other != names[first]:
            i = next((i for i, pair in enumerate(zip(names[first], other, strict=False)) if pair[0] != pair[1]), len(other))
            raise UserError(
                f"the splits {first!r} and {split!r} count their classes differently: {len(names[first])} and {len(other)} "
                f"classes, number {i} is the first that differs. Give both splits the same class folders (an empty folder "
                "counts), or the same class names."
            )


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
