"""Patients with several modalities, some of them missing: folds that never split a patient, and one truth per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.cohorts import Arrays, Cohort, Modality, PatchFiles
from datamodules.rows import RowDataset
from models.batch import INDEX, KEY, LABEL
from models.errors import UserError
from models.io import stable_hash
from models.mm_lego.batch import BIN, CENSORED, PRESENT, TARGETS, TIME, modality_key
from models.mm_lego.survival import survival_bins

SPLITS = ("train", "val", "test")
OF_FOLDS, OF_MISSING, OF_OVERLAP = range(3)  # purposes of generators


class Patients(RowDataset):
    """One split of a cohort.

    Args:
        cohort: all samples, standardised.
        rows: (n,) of the cohort that are in this split.
        present: (n, M) bool, which modalities they have here.
        bins: (S,) of the survival times; None for other tasks.
        patches: rows of a bag in each batch, see :class:`PatientsDataModule`.
        training: draw other patches in every epoch, and replace bad samples.
        in_memory: keep what was read from files.
    """

    def __init__(
        self,
        cohort: Cohort,
        rows: np.ndarray,
        present: np.ndarray,
        bins: np.ndarray | None,
        patches: int | None,
        training: bool = False,
        in_memory: bool = False,
    ):
        self.cohort, self.rows, self.present, self.patches = cohort, rows, present, patches
        self.training, self.in_memory = training, in_memory
        self.truth = {name: torch.from_numpy(values[rows]) for name, values in cohort.truth.items()}
        if bins is not None:
            self.truth[BIN] = torch.from_numpy(bins[rows])
        self.patients = [cohort.patients[row] for row in rows]
        self._bags: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Changes with the samples, their truth and the modalities they have here."""
        names = [self.cohort.samples[row] for row in self.rows]
        return stable_hash([names, {name: values.tolist() for name, values in self.truth.items()}, self.present.tolist()])

    def key(self, row: int) -> str:
        return self.cohort.samples[self.rows[row]]

    def read(self, row: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The bags of patches that the sample has; :meth:`collate` takes the arrays of all samples at once."""
        return {
            name: self._some_rows(self._bag(name, modality, int(self.rows[row])), rng)
            for (name, modality), has in zip(self.cohort.modalities.items(), self.present[row], strict=True)
            if has and isinstance(modality, PatchFiles)
        }

    def collate(self, rows: list[int], samples: list[dict[str, np.ndarray]], request: BatchRequest) -> dict[str, Any]:
        batch: dict[str, Any] = {KEY: [self.key(row) for row in rows]}
        for column, (name, modality) in enumerate(self.cohort.modalities.items()):
            if isinstance(modality, Arrays):
                values = modality.values[self.rows[rows]] * self.present[rows, column, None, None]
            else:
                longest = max([len(sample[name]) for sample in samples if name in sample], default=0)
                rows_of_bag, width = self.shape_of(modality)
                values = np.zeros((len(rows), max(longest, rows_of_bag), width), np.float32)
                for i, sample in enumerate(samples):
                    if name in sample:
                        values[i, : len(sample[name])] = sample[name]
            batch[modality_key(name)] = torch.from_numpy(values)
        batch[PRESENT] = torch.from_numpy(self.present[rows])
        return batch | {name: values[rows] for name, values in self.truth.items()}

    def shape_of(self, modality: Modality) -> tuple[int, ...]:
        if isinstance(modality, PatchFiles) and self.patches is not None:
            return self.patches, modality.shape[1]
        return modality.shape

    def _bag(self, name: str, modality: PatchFiles, sample: int) -> np.ndarray:
        if not self.in_memory:
            return modality.read(sample)
        if (name, sample) not in self._bags:
            self._bags[name, sample] = modality.read(sample)
        return self._bags[name, sample]

    def _some_rows(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``patches`` rows of a bag in their order; a smaller bag repeats some of its rows."""
        if self.patches is None:
            return values
        if not self.training:
            return values[np.linspace(0, len(values) - 1, self.patches).round().astype(int)]
        return values[np.sort(rng.choice(len(values), self.patches, replace=len(values) < self.patches))]


class PatientsDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`Patients` after ``prepare_data(); setup()``.

    Args:
        cohort: reader, ``(root) -> Cohort``.
        root: folder of the data, for readers that have one.
        simulate: writes a simulated cohort, ``simulate(root) -> folder``.
        modalities: the ones that batches hold, in this order; null: all of the cohort. Training leaves out samples with none
            of them, held-out splits keep every sample, so that all methods are judged on the same patients.
        fold: 1 to ``folds``: which part is the split test.
        folds: parts of the patients, with equal shares of events or classes.
        val_share: of the patients outside the test part; 0: no split val.
        splitting: "official" draws 70, 15 and 15 percent of the *samples* with the seed ``fold``, without regard to patients.
        fold_seed: of the parts.
        num_bins: of survival times, at quantiles of the times of events.
        statistics: on which samples bins, means and deviations are computed; "cohort" is official and lets held-out patients
            take part.
        scale: columns of tables and series to mean 0 and deviation 1; officially not for TCGA.
        complete_only: leave out samples that lack a modality of the cohort, which is official.
        missing: chance that a modality of a sample is taken away, by split; one modality always stays. The samples that lose
            one at a small chance lose it at a larger one too.
        overlap: share of the training patients who keep all modalities; each of the others keeps one, by turns. Blocks of
            different modalities then train on patients who do not overlap.
        patches: rows of each bag, drawn anew in training and at equal distances in evaluation; a smaller bag repeats rows.
            null: all rows, with zeros up to the rows of the files, which is official.
        in_memory: keep bags that were read.
        batch_size: training samples per device and step.
        eval_batch_size: samples of a batch in validation and test.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: impossible folds, an unknown modality, or data that the reader cannot use.
    """

    # How a sample is seen, and the fold: weights of one fold have seen the test patients of the others.
    preprocessing = (
        "modalities", "fold", "folds", "splitting", "fold_seed", "num_bins", "statistics", "scale", "patches",
    )  # fmt: skip
    held_out = ("fold", "folds", "splitting", "fold_seed", "complete_only")

    def __init__(
        self,
        cohort: Callable[[Path], Cohort],
        root: str = "",
        simulate: Callable[[str], Path] | None = None,
        modalities: Sequence[str] | None = None,
        fold: int = 1,
        folds: int = 5,
        val_share: float = 0.15,
        splitting: Literal["patients", "official"] = "patients",
        fold_seed: int = 0,
        num_bins: int = 4,
        statistics: Literal["train", "cohort"] = "train",
        scale: bool = True,
        complete_only: bool = False,
        missing: Mapping[str, float] | None = None,
        overlap: float = 1.0,
        patches: int | None = 256,
        in_memory: bool = False,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        if not 1 <= fold <= folds or folds < 2:
            raise UserError(f"datamodule.fold={fold}: there are {folds} folds, 1 to {folds}, and at least 2 are needed.")
        for name, share in {
            "val_share": val_share,
            "overlap": overlap,
            **{f"missing.{s}": v for s, v in (missing or {}).items()},
        }.items():
            if not 0 <= share <= 1:
                raise UserError(f"datamodule.{name}={share} is a share, between 0 and 1.")
        if unknown := (missing or {}).keys() - set(SPLITS):
            raise UserError(f"datamodule.missing names {sorted(unknown)}; the splits are {', '.join(SPLITS)}.")
        self.reader, self.root, self.simulate = cohort, root, simulate
        self.modalities = None if modalities is None else tuple(modalities)
        self.fold, self.folds, self.val_share, self.splitting, self.fold_seed = fold, folds, val_share, splitting, fold_seed
        self.num_bins, self.statistics, self.scale, self.complete_only = num_bins, statistics, scale, complete_only
        self.missing, self.overlap = dict(missing or {}), overlap
        self.patches, self.in_memory = patches, in_memory
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size

    @property
    def provides(self) -> tuple[str, ...]:
        return (INDEX, KEY, PRESENT, *map(modality_key, self.cohort.modalities), *self.splits["train"].truth)

    @property
    def reads_arrays(self) -> bool:
        return self.in_memory or all(isinstance(modality, Arrays) for modality in self.cohort.modalities.values())

    def holds_data(self, root: Path) -> bool:
        return (root / "tcga").is_dir()

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        cohort = self.reader(self.folder())
        if unknown := set(self.modalities or ()) - set(cohort.modalities):
            raise UserError(f"datamodule.modalities: there is no {sorted(unknown)}; the cohort has {[*cohort.modalities]}.")
        if self.complete_only:
            cohort = cohort.part(np.flatnonzero(cohort.has.all(axis=1)))
            if not cohort.samples:
                raise UserError("datamodule.complete_only=true: no sample has all modalities.")
        names = [*(self.modalities or cohort.modalities)]
        columns = [[*cohort.modalities].index(name) for name in names]
        self.label_names = cohort.label_names
        split_of = self._splits(cohort)
        has = self._present(cohort, split_of)
        self.cohort, self.bins, self.bin_edges = self._standardised(cohort, split_of, has, names)
        self._all_present, self._columns = has, columns
        for split in SPLITS:
            rows = np.flatnonzero(split_of == split)
            rows = rows[has[rows].any(axis=1)]
            if split == "train":
                rows = rows[has[rows][:, columns].any(axis=1)]
            if len(rows):
                self.splits[split] = self._dataset(rows, has, training=split == "train")
        if "train" not in self.splits or "test" not in self.splits:
            raise UserError(f"datamodule.fold={self.fold}: {len(cohort.samples)} samples do not fill {self.folds} folds.")
        self.report_skipped("train", cohort.skipped)

    def facts(self) -> dict[str, Any]:
        train = self.splits["train"]
        shapes = {name: list(train.shape_of(modality)) for name, modality in self.cohort.modalities.items()}
        facts: dict[str, Any] = {"shapes": shapes, "task": self.cohort.task}
        if self.cohort.task == "multi_label":
            return facts | {"num_classes": train.truth[TARGETS].shape[1]}
        labels, count = (train.truth[BIN], self.num_bins) if self.bins is not None else (train.truth[LABEL], self.num_labels)
        counts = torch.bincount(labels, minlength=count).tolist()
        return facts | {"num_classes": count, "class_counts": counts, "bin_edges": self.bin_edges}

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or int(self.cohort.truth[LABEL].max()) + 1

    def train_dataloader(self) -> DataLoader:
        train = self.splits["train"]
        return self.train_loader(train, self.batch_size, drop_last=len(train) >= self.batch_size * self._world_size())

    def evaluation_dataloader(self, split: str, missing: float | None = None, draw: int = 0) -> DataLoader:
        """Batches of a split.

        Args:
            split: train, val or test.
            missing: chance that a modality is taken away, in place of ``datamodule.missing``.
            draw: which of the possible draws of missing modalities.
        """
        dataset = self.splits[split]
        has = self._all_present
        if missing is not None:
            has = self._without(self._has, np.full(len(has), missing), draw)
        return self.evaluation_loader(self._dataset(dataset.rows, has, bags=dataset._bags), self.eval_batch_size)

    def _dataset(self, rows: np.ndarray, has: np.ndarray, training: bool = False, bags: dict | None = None) -> Patients:
        dataset = Patients(self.cohort, rows, has[rows][:, self._columns], self.bins, self.patches, training, self.in_memory)
        if bags is not None:
            dataset._bags = bags
        return dataset

    def _splits(self, cohort: Cohort) -> np.ndarray:
        """(S,) name of the split of each sample."""
        count = len(cohort.samples)
        split_of = np.full(count, "train", dtype=object)
        if self.splitting == "official":  # torch.utils.data.random_split of 70 %, 15 % and the rest: train, test, val
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.fold)).numpy()
            train, test = int(0.7 * count), int(0.15 * count)
            split_of[order[train : train + test]], split_of[order[train + test :]] = "test", "val"
            return split_of
        names = sorted(set(cohort.patients))
        number = {name: i for i, name in enumerate(names)}
        patient_of = np.array([number[name] for name in cohort.patients])
        strata = np.zeros(len(names), np.int64)
        np.maximum.at(strata, patient_of, cohort.strata)
        ranks = stratified_ranks(strata, np.random.default_rng((self.fold_seed, OF_FOLDS)))
        test = ranks % self.folds == self.fold - 1
        rest = np.flatnonzero(~test)
        ranks = stratified_ranks(strata[rest], np.random.default_rng((self.fold_seed, OF_FOLDS, self.fold)))
        val = np.zeros(len(names), bool)
        val[rest] = np.floor((ranks + 1) * self.val_share) > np.floor(ranks * self.val_share)
        split_of[test[patient_of]], split_of[val[patient_of]] = "test", "val"
        return split_of

    def _present(self, cohort: Cohort, split_of: np.ndarray) -> np.ndarray:
        """(S, M) bool: which modalities each sample has, after those that were taken away."""
        self._has = cohort.has
        chances = np.array([self.missing.get(split, 0.0) for split in split_of])
        has = self._without(cohort.has, chances)
        if self.overlap == 1.0:
            return has
        training = sorted({cohort.patients[row] for row in np.flatnonzero(split_of == "train")})
        order = np.random.default_rng((self.fold_seed, OF_OVERLAP)).permutation(len(training))
        apart = [training[i] for i in order[round(self.overlap * len(training)) :]]
        turn = {patient: i % has.shape[1] for i, patient in enumerate(apart)}
        for row in np.flatnonzero(split_of == "train"):
            if (keeps := turn.get(cohort.patients[row])) is not None:
                has[row, np.arange(has.shape[1]) != keeps] = False
        return has

    def _without(self, has: np.ndarray, chances: np.ndarray, draw: int = 0) -> np.ndarray:
        """``has`` (S, M) after each modality was taken away with the chance (S,) of its sample; the last one stays."""
        luck = np.random.default_rng((self.fold_seed, OF_MISSING, draw)).random(has.shape)
        stays = has & (luck >= chances[:, None])
        luckiest = np.where(has, luck, -1).argmax(axis=1)
        lost = has.any(axis=1) & ~stays.any(axis=1)
        stays[lost, luckiest[lost]] = True
        return stays

    def _standardised(
        self, cohort: Cohort, split_of: np.ndarray, has: np.ndarray, names: Sequence[str]
    ) -> tuple[Cohort, np.ndarray | None, list[float] | None]:
        """The cohort with its tables filled and scaled, the bins of survival times, and their edges."""
        fit = np.ones(len(split_of), bool) if self.statistics == "cohort" else split_of == "train"
        modalities: dict[str, Modality] = {}
        for column, (name, modality) in enumerate(cohort.modalities.items()):
            if name in names:
                rows = np.flatnonzero(fit & has[:, column])
                if not len(rows):
                    raise UserError(f"no sample of the split train has the modality {name!r}.")
                modalities[name] = modality.standardise(rows, self.scale) if isinstance(modality, Arrays) else modality
        modalities = {name: modalities[name] for name in names}
        chosen = Cohort(cohort.samples, cohort.patients, modalities, cohort.truth, cohort.label_names)
        if cohort.task != "survival":
            return chosen, None, None
        times, censored = (torch.from_numpy(cohort.truth[name]) for name in (TIME, CENSORED))
        _, edges = survival_bins(times[torch.from_numpy(fit)], censored[torch.from_numpy(fit)], self.num_bins)
        bins = (torch.bucketize(times.double(), edges, right=True) - 1).clamp(0, self.num_bins - 1)
        return chosen, bins.numpy(), edges.tolist()


def stratified_ranks(strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random rank for each patient, all those of a stratum next to each other: every k-th rank has equal shares of strata."""
    ranks = np.empty(len(strata), np.int64)
    ranks[np.lexsort((rng.random(len(strata)), strata))] = np.arange(len(strata))
    return ranks
