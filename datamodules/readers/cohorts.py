"""What readers of patients give: a cohort with its modalities and the truth about each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datamodules.readers.base import BadSample
from models.batch import LABEL, Skipped
from models.errors import UserError
from models.io import CheckpointError, read_tensor
from models.mm_lego.batch import CENSORED, TARGETS, TIME

LARGEST_BAG = 2**31  # bytes of the patches of a sample: half a million of width 1,024


class Arrays:
    """Tables or time series in memory; a sample without a single known value lacks the modality.

    Attributes:
        has: (S,) bool, whether a sample has the modality.
        shape: (N, W) of a sample.

    Args:
        values: (S, N, W); NaN where a value is unknown, until :meth:`standardise` fills it.
    """

    def __init__(self, values: np.ndarray):
        self.values: np.ndarray = np.ascontiguousarray(values, np.float32)
        self.has: np.ndarray = ~np.isnan(self.values).all(axis=(1, 2))
        self.shape: tuple[int, ...] = self.values.shape[1:]

    def standardise(self, rows: np.ndarray, scale: bool) -> Arrays:
        """A copy with the mean of ``rows`` in place of unknown values; with ``scale`` each column, over samples and steps, has
        mean 0 and deviation 1 on ``rows``. A constant column becomes 0."""
        fit = self.values[rows].astype(np.float64)
        known = ~np.isnan(fit)
        counts = np.maximum(known.sum(axis=(0, 1)), 1)
        mean = np.where(known, fit, 0).sum(axis=(0, 1)) / counts
        filled = np.where(np.isnan(self.values), mean, self.values)
        if scale:
            deviation = np.sqrt((np.where(known, fit - mean, 0) ** 2).sum(axis=(0, 1)) / counts)
            filled = (filled - mean) / np.where(deviation > 0, deviation, 1)
        out = Arrays(filled)
        out.has = self.has
        return out

    def read(self, sample: int) -> np.ndarray:
        """(N, W) of a sample."""
        return self.values[sample]


class PatchFiles:
    """Bags of patch features, a ``.pt`` tensor (n, W) for each sample. Rows of zeros at the end are padding.

    Attributes:
        has: (S,) bool, whether a sample has a file.
        shape: (n, W) of the first file; official files all have the rows of the largest bag.

    Args:
        paths: of each sample; None where it has no file.
        counts: true number of rows, by file name without ending; files without one keep all rows but the zeros at their end.

    Raises:
        UserError: no file at all, or the first one is no tensor of two dimensions.
    """

    def __init__(self, paths: Sequence[Path | None], counts: Mapping[str, int] | None = None):
        self.paths, self.counts = list(paths), dict(counts or {})
        self.has: np.ndarray = np.array([path is not None for path in paths])
        first = next((path for path in paths if path is not None), None)
        if first is None:
            raise UserError("no sample has a file of patch features.")
        try:
            self.shape: tuple[int, ...] = tuple(self._load(first).shape)
        except BadSample as error:
            raise UserError(f"{first}: {error}") from error

    def read(self, sample: int) -> np.ndarray:
        """(n, W) of a sample that has the modality. Raises BadSample."""
        path = self.paths[sample]
        values = self._load(path)
        if values.shape[1] != self.shape[1]:
            raise BadSample(f"patches: {path.name} has width {values.shape[1]}, the others have {self.shape[1]}")
        filled: np.ndarray = np.flatnonzero(values.any(axis=1))
        rows = self.counts.get(path.stem, int(filled[-1]) + 1 if len(filled) else 0)
        if rows == 0:
            raise BadSample(f"patches: {path.name} has no patch")
        return values[:rows]

    def _load(self, path: Path) -> np.ndarray:
        try:
            tensor = read_tensor(path)
        except CheckpointError as error:
            raise BadSample(f"unreadable: {error}") from error
        if tensor.nbytes > LARGEST_BAG:
            raise BadSample(f"patches: {path.name} has {tensor.nbytes} bytes, more than {LARGEST_BAG}")
        if tensor.ndim != 2 or not bool(tensor.isfinite().all()):
            raise BadSample(f"patches: {path.name} is no finite tensor of two dimensions")
        return tensor.float().numpy()


Modality = Arrays | PatchFiles


@dataclass
class Cohort:
    """S samples of patients.

    Args:
        samples: names.
        patients: of the samples; a patient with several is never split.
        modalities: by name, in the order in which models take them.
        truth: TIME and CENSORED for survival, LABEL for classes, or TARGETS (S, C) for several labels.
        label_names: of classes or labels.
        skipped: entries that could not be used.
    """

    samples: list[str]
    patients: list[str]
    modalities: Mapping[str, Modality]
    truth: dict[str, np.ndarray]
    label_names: Sequence[str] = ()
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def task(self) -> str:
        if TIME in self.truth:
            return "survival"
        return "classification" if LABEL in self.truth else "multi_label"

    @property
    def strata(self) -> np.ndarray:
        """(S,) int64: what splits should hold equally often: events, classes, or whether a sample has any label."""
        if TIME in self.truth:
            return (~self.truth[CENSORED]).astype(np.int64)
        labels: np.ndarray = self.truth[LABEL] if LABEL in self.truth else self.truth[TARGETS].max(axis=1)
        return labels.astype(np.int64)

    @property
    def has(self) -> np.ndarray:
        """(S, M) bool: which modalities each sample has."""
        return np.stack([modality.has for modality in self.modalities.values()], axis=1)

    def part(self, rows: np.ndarray) -> Cohort:
        """The cohort of some samples."""
        modalities: dict[str, Modality] = {}
        for name, modality in self.modalities.items():
            if isinstance(modality, Arrays):
                modalities[name] = Arrays(modality.values[rows])
            else:
                modalities[name] = PatchFiles([modality.paths[row] for row in rows], modality.counts)
        names = [self.samples[row] for row in rows], [self.patients[row] for row in rows]
        return Cohort(*names, modalities, {k: v[rows] for k, v in self.truth.items()}, self.label_names, self.skipped)
