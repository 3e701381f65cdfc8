"""What every datamodule shares: named splits, one way to skip bad samples, one resumable order of training batches."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from datamodules.order import HeldOutBatches, OrderedBatches
from datamodules.readers.text import clean_text
from datamodules.rows import as_is
from models.batch import INDEX, SKIPPED, Skipped
from models.errors import UserError
from models.io import exclusive

LISTED = 20  # skips of a split that are listed one by one in messages and in the report
ALWAYS_ALLOWED = 10  # skips of a split: a share of a small hand-made set would not let one bad file pass
SIMULATED = "simulated"  # name of folders that simulated sets are written into
SPLIT_OF_STAGE = {"train": "train", "validate": "val", "sanity_check": "val", "test": "test"}


class BaseDataModule(pl.LightningDataModule):
    """A family fills ``splits`` in :meth:`setup` and ``train_dataloader`` returns :meth:`train_loader`.

    Args:
        seed: decides, with the epoch, on the order of the training samples.
        num_workers: processes that read for each device; 0 reads in the main process, 'auto' is :func:`suitable_workers`.
        max_skipped: share of a split's samples that may be unreadable (10 samples are always allowed). Web corpora
            lose up to a few percent to broken files; more than the default 5 % is rather a wrong path, a wrong
            caption field or a broken copy, and training on the rest would hide it.
    """

    root: str = ""  # set by families that read a folder
    provides: tuple[str, ...] = ()  # keys of every training batch; a property where they follow from the settings
    preprocessing: tuple[str, ...] = ()  # arguments that decide how the model sees a sample: those of training hold later
    held_out: tuple[str, ...] = ()  # arguments that decide which samples are held out: training on from weights repeats them
    label_names: Sequence[str] = ()  # classes or answers that a model of this data gives by number
    reads_arrays = False  # rows are copied out of arrays: nothing is decoded
    workers_key = "datamodule.num_workers"  # where a user sets the number of workers
    _simulate: Callable[[str], Path] | None = None

    @property
    def simulate(self) -> Callable[[str], Path] | None:
        """``root -> folder``, which writes a simulated set; None for data that is there.

        Sizes of a simulated set without a function are what an option of ``debug`` leaves beside data that is not simulated:
        they mean nothing there.
        """
        return self._simulate

    @simulate.setter
    def simulate(self, function: Callable[[str], Path] | Mapping[str, Any] | None) -> None:
        self._simulate = function if callable(function) else None

    @property
    def hashes(self) -> Mapping[str, str]:
        """By name, of what numbers in the weights stand for, such as the entities of a graph: later runs must repeat them."""
        return {}

    def __init__(self, seed: int = 0, num_workers: int | Literal["auto"] = "auto", max_skipped: float = 0.05):
        super().__init__()
        if not 0 <= max_skipped <= 1:
            raise UserError(f"datamodule.max_skipped={max_skipped} is a share of the samples, between 0 and 1.")
        self.seed, self.num_workers, self.max_skipped = seed, num_workers, max_skipped
        self.splits: dict[str, Any] = {}
        self.notes: list[str] = []
        self._skipped: dict[str, dict[Skipped, None]] = {}
        self._position = {"epoch": 0, "batch": 0, "samples": 0, "batch_size": 0}

    # ---- where the data lies --------------------------------------------------------------------------------------

    def holds_data(self, root: Path) -> bool:
        """Whether ``root`` is a dataset of its own, which is then used although ``simulate`` is given."""
        return False

    def folder(self) -> Path:
        """The dataset's folder: ``root``, or what ``simulate`` wrote below it.

        Raises UserError where ``root`` is neither a dataset nor a place for simulated ones: a misspelt path must not be filled
        with simulated data.
        """
        root = Path(self.root).expanduser()
        if self.simulate is None or self.holds_data(root):
            return root
        if not is_for_simulated_data(root):
            raise UserError(
                f"datamodule.root={self.root} holds no data that {type(self).__name__} reads, and is no folder for simulated "
                "data either. Check the path. Data in another format needs its datamodule=<option> beside it. For simulated "
                f"data leave datamodule.root as it is, or give an empty folder, or one that is named {SIMULATED!r}."
            )
        with exclusive(root / SIMULATED):
            return Path(self.simulate(str(root)))

    @property
    def simulated(self) -> bool:
        """Whether the data is what ``simulate`` writes."""
        return self.simulate is not None and not self.holds_data(Path(self.root).expanduser())

    def prepare_data(self) -> None:
        """Write the simulated set where it is wanted and missing; runs in one process per machine."""
        if self.simulate is not None:
            self.folder()

    # ---- what a family implements ---------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """What the data decides for the model (feature widths, number of classes): fills module arguments left null."""
        return {}

    def evaluation_dataloader(self, split: str) -> DataLoader:
        """Batches of a split without augmentation, in the order of its rows: validation and the stage ``evaluate``."""
        raise NotImplementedError

    def val_dataloader(self) -> DataLoader | list:
        return self.evaluation_dataloader("val") if "val" in self.splits else []

    # ---- bad samples --------------------------------------------------------------------------------------------

    def report_skipped(self, split: str, skipped: Iterable[Skipped]) -> None:
        """Count what could not be read; the same sample counts once, in however many epochs it is met.

        Raises UserError with a summary as soon as a split lost more than ``max_skipped`` of its samples.
        """
        known = self._skipped.setdefault(split, {})
        clean = (Skipped(entry.index, clean_text(entry.key), clean_text(entry.reason)) for entry in skipped)
        known.update(dict.fromkeys(clean))
        total = len(self.splits[split]) + sum(entry.index < 0 for entry in known)
        if len(known) > max(ALWAYS_ALLOWED, self.max_skipped * total) or len(known) == total:
            kinds = ", ".join(f"{count} {kind}" for kind, count in _count_kinds(known).items())
            first = "\n".join(f"  {entry.key}: {entry.reason}" for entry in list(known)[:5])
            raise UserError(
                f"{len(known)} of {total} samples of the split {split!r} cannot be read ({kinds}), more than "
                f"datamodule.max_skipped={self.max_skipped:g} allows. The first:\n{first}\nFix the data (is it "
                "the right folder, the right caption field, a complete copy?), or raise datamodule.max_skipped to go "
                "on with the rest."
            )

    def skip_report(self) -> dict[str, Any]:
        """JSON-able: how many samples each split lost, by kind of reason, and the first ones by name."""
        splits = {
            split: {
                "total": len(known),
                "reasons": _count_kinds(known),
                "first": [entry._asdict() for entry in list(known)[:LISTED]],
            }
            for split, known in self._skipped.items()
            if known
        }
        every = [entry for known in self._skipped.values() for entry in known]
        return {"total": len(every), "reasons": _count_kinds(every), "splits": splits}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take the skips that a reading worker found out of the batch and report them. Raises UserError for a batch without a
        single sample."""
        if isinstance(batch, dict) and (skipped := batch.pop(SKIPPED, None)):
            self.report_skipped(SPLIT_OF_STAGE[self.trainer.state.stage.value], skipped)
            if not len(batch[INDEX]):
                reasons = "\n".join(f"  {entry.key}: {entry.reason}" for entry in list(dict.fromkeys(skipped))[:5])
                raise UserError(
                    f"not one sample of a batch can be read, nor any of those behind it. The first:\n{reasons}\nFix the data "
                    "(is it the right folder, a complete copy?)."
                )
        return batch

    # ---- order and resume ---------------------------------------------------------------------------------------

    def train_loader(self, dataset: Any, batch_size: int, drop_last: bool = True) -> DataLoader:
        """Loader of whole batches, ``dataset[BatchRequest] -> batch``, in the resumable order.

        On a resumed run it goes on with the first batch that was not yet trained on, whatever workers had read ahead.

        Raises UserError where the dataset does not fill one batch.
        """
        together = batch_size * self._world_size()
        if drop_last and len(dataset) < together:
            raise UserError(
                f"the training split has {len(dataset)} samples, fewer than a batch of {together} (batch_size={batch_size} on "
                f"{self._world_size()} devices): nothing would be trained. Lower the batch size, or take more data."
            )
        self._check_position(len(dataset), together)
        sampler = OrderedBatches(
            len(dataset),
            batch_size,
            shuffle=not self._overfitting(),
            seed=self.seed,
            drop_last=drop_last,
            rank=self._rank(),
            world_size=self._world_size(),
            position=self.position,
        )
        return self._loader(dataset, sampler)

    def evaluation_loader(self, dataset: Any, batch_size: int) -> DataLoader:
        """Loader of whole batches in the order of the rows, the last one smaller; see :class:`HeldOutBatches` for ranks.

        Without a trainer there is one process, which gets every batch.
        """
        return self._loader(dataset, HeldOutBatches(len(dataset), batch_size, self._rank(), self._world_size()))

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of one epoch, known before any data is read."""
        return len(self.train_dataloader())

    def position(self) -> tuple[int, int]:
        """Where training stands: the epoch, and how many of its batches have been trained on.

        Counted by the batches the trainer has finished in all, since what workers have read ahead is not trained on
        yet.
        ``processed`` and not ``completed``: inside ``on_train_batch_end``, where checkpoints are written, only the
        former counts the batch whose step is already in the weights. Do not save in ``on_train_epoch_start``: Lightning
        itself (2.6) then takes the new epoch for a finished one.
        """
        steps = self.trainer.num_training_batches if self.trainer is not None else 0
        if not isinstance(steps, int) or steps == 0:  # not fitting, or not started yet
            return self._position["epoch"], self._position["batch"]
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return divmod(batches.processed, steps)

    def state_dict(self) -> dict[str, int]:
        """The position, and the samples and total batch size among which it means something."""
        epoch, batch = self.position()
        return {**self._position, "epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._position = {name: int(state_dict[name]) for name in self._position}
        # Lightning looks for a position in the loader; ours is here, and exact.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")

    def _check_position(self, samples: int, batch_size: int) -> None:
        """A place in the middle of an epoch means something only among the same samples in the same batches."""
        then = self._position
        if then["batch"] and (then["samples"], then["batch_size"]) != (samples, batch_size):
            raise UserError(
                f"the checkpoint stands at batch {then['batch']} of epoch {then['epoch']}, {then['samples']} samples "
                f"in batches of {then['batch_size']}; now there are {samples} samples in batches of {batch_size} (all "
                "devices together). Resume with the same data and total batch size, or start a new run."
            )
        self._position = {**then, "samples": samples, "batch_size": batch_size}

    def _loader(self, dataset: Any, sampler: OrderedBatches | HeldOutBatches) -> DataLoader:
        workers = self.workers()
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=as_is,
            pin_memory=self._on_gpu(),  # Lightning then copies to the device without waiting
        )

    def workers(self, processes: int | None = None) -> int:
        """Reading processes of each training process, of which ``processes`` share the machine, by default the trainer's."""
        if self.num_workers != "auto":
            return self.num_workers
        if processes is None:
            processes = self.trainer.num_devices if self.trainer is not None else 1
        return suitable_workers(_cores(), processes, self._on_gpu(), self.reads_arrays)

    def _on_gpu(self) -> bool:
        if self.trainer is None:
            return torch.cuda.is_available()
        return self.trainer.strategy.root_device.type == "cuda"

    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _overfitting(self) -> bool:
        return self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # Lightning sets it by setattr


def suitable_workers(cores: int, processes: int, on_gpu: bool, reads_arrays: bool) -> int:
    """Reading processes for each training process of a machine.

    One core stays with the training process. On a CPU the model needs the cores, too, so that few more would help, and rows of
    arrays cost less than handing them over. A GPU waits for whoever decodes; a few processes copy rows as fast as a disk gives
    them.

    Args:
        cores: that this process may use.
        processes: training processes that share them.
        on_gpu: whether the model runs on a GPU.
        reads_arrays: whether rows are copied out of arrays.
    """
    free = max(cores // max(processes, 1) - 1, 0)
    if on_gpu:
        return min(free, 4 if reads_arrays else 16)
    return 0 if reads_arrays else min(free, 8)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_for_simulated_data(root: Path) -> bool:
    """Whether simulated sets may be written into ``root``: it is named so, or is a folder of nothing but such sets."""
    sets = re.compile(r"\w+_[0-9a-f]{16}")
    return root.name == SIMULATED or (
        root.is_dir() and all(sets.fullmatch(entry.name) or entry.name.startswith(".") for entry in root.iterdir())
    )


def _count_kinds(skipped: Iterable[Skipped]) -> dict[str, int]:
    return dict(Counter(entry.reason.split(":")[0] for entry in skipped).most_common())
