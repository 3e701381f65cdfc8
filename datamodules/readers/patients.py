"""Patients with tables and time series or images: MIMIC-III, ISIC, and the cohorts that ship with scikit-survival."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.readers.cohorts import Arrays, Cohort, Modality, PatchFiles
from models.batch import LABEL
from models.errors import UserError
from models.mm_lego.batch import CENSORED, TARGETS, TIME

ISIC_TABLE = ("sex", "anatom_site_general_challenge")
ISIC_LEAKS = ("diagnosis", "benign_malignant")
LARGEST_PICKLE = 2**32  # bytes; MIMIC-III's file has some hundred million
NUMPY = {  # what a pickle of arrays needs, under the module names of old and new NumPy
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}  # fmt: skip


def mimic(root: Path, task: Literal["mortality", "icd9"] = "mortality", groups: Sequence[int] = (7,)) -> Cohort:
    """MIMIC-III's ICU stays in MultiBench's ``im.pk``: 5 static values ("static") and 24 hours of 12 vitals ("series").

    Args:
        root: holds ``im.pk``.
        task: "mortality" has six classes: the first positive one of columns 1 to 5 of ``adm_labels_all``, else 0. "icd9" is
            whether a stay has a diagnosis of a group; several groups are several labels.
        groups: columns of ``y_icd9``; MultiBench uses 1 and 7.

    Raises UserError where the file holds anything but arrays, or lacks one.
    """
    content = read_arrays(root / "im.pk")
    try:
        static, series = content["adm_features_all"], content["ep_tdata"]
        labels = content["adm_labels_all" if task == "mortality" else "y_icd9"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{root / 'im.pk'} is not MultiBench's file of MIMIC-III: it lacks {error}.") from error
    static, series = (np.nan_to_num(np.asarray(x, np.float32), posinf=0, neginf=0) for x in (static, series))
    stays = [f"stay {number}" for number in range(len(static))]  # the file does not name the patients
    modalities = {"static": Arrays(static[:, None]), "series": Arrays(series)}
    if task == "mortality":
        positive = np.asarray(labels)[:, 1:6] > 0
        label = np.where(positive.any(axis=1), positive.argmax(axis=1) + 1, 0)
        names = [str(number) for number in range(6)]
        return Cohort(stays, stays, modalities, {LABEL: label.astype(np.int64)}, names)
    targets = np.asarray(labels)[:, list(groups)] > 0
    names = [f"group {group}" for group in groups]
    if len(groups) > 1:
        return Cohort(stays, stays, modalities, {TARGETS: targets.astype(np.float32)}, names)
    return Cohort(stays, stays, modalities, {LABEL: targets[:, 0].astype(np.int64)}, ["other", names[0]])


class _Arrays(pickle.Unpickler):
    """Reads NumPy arrays in plain containers and nothing else: a pickle from a stranger may otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NUMPY:
            raise UserError(f"the pickle asks for {module}.{name}; only arrays in plain containers are read from it.")
        return super().find_class(module, name)


def read_arrays(path: Path) -> Any:
    """The content of a pickle of NumPy arrays. Raises UserError where it is missing, damaged or holds anything else."""
    if not path.is_file():
        raise UserError(f"{path} is missing.")
    if (size := path.stat().st_size) > LARGEST_PICKLE:
        raise UserError(f"{path} has {size} bytes; a pickle of more than {LARGEST_PICKLE} bytes is not read.")
    with path.open("rb") as file:
        try:
            return _Arrays(file, encoding="latin1").load()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # a damaged pickle raises many kinds
            raise UserError(f"{path} cannot be read as a pickle of arrays ({error}). Fetch it again.") from error


def isic(root: Path, leaks: bool = False) -> Cohort:
    """ISIC 2020: age, sex and site ("table"), and ResNet-50 features of 15 crops of each image ("image").

    Files: ``train.csv`` and ``img_prep/<image_name>.pt`` (15, 2048).

    Args:
        root: folder of both.
        leaks: True is official: the table also has diagnosis and benign_malignant, and the latter is the target.

    Raises UserError where a file or column is missing.
    """
    path = root / "train.csv"
    if not path.is_file():
        raise UserError(f"{path} is missing.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = (*ISIC_TABLE, *(ISIC_LEAKS if leaks else ()))
    if not rows or (lost := {"image_name", "patient_id", "age_approx", "target", *columns} - rows[0].keys()):
        raise UserError(f"{path} lacks {sorted(lost) if rows else 'rows'}.")
    table = [[float(row["age_approx"] or "nan") for row in rows]]
    for column in columns:
        table += [[float(row[column] == value) for row in rows] for value in sorted({row[column] for row in rows} - {""})]
    files = {file.stem: file for file in (root / "img_prep").glob("*.pt")}
    modalities: dict[str, Modality] = {
        "table": Arrays(np.array(table, np.float32).T[:, None]),
        "image": PatchFiles([files.get(row["image_name"]) for row in rows]),
    }
    labels = np.array([int(float(row["target"])) for row in rows], np.int64)
    names, patients = [row["image_name"] for row in rows], [row["patient_id"] for row in rows]
    return Cohort(names, patients, modalities, {LABEL: labels}, ["benign", "malignant"])


def scikit_survival(root: Path, name: str, modalities: Mapping[str, str | Sequence[str]]) -> Cohort:
    """A cohort that ships with scikit-survival, its columns grouped into modalities. Nothing is downloaded.

    Args:
        root: not used.
        name: of its loader: breast_cancer, gbsg2, whas500, veterans_lung_cancer, ...
        modalities: by name, the columns or their common prefix. Numbers are one column each, categories one column for each
            value but the first.

    Raises UserError where the package, the cohort or a column is missing.
    """
    try:
        from sksurv import datasets
    except ImportError as error:
        raise UserError("this cohort ships with scikit-survival: pip install scikit-survival.") from error
    loader = getattr(datasets, f"load_{name}", None)
    if loader is None:
        known = ", ".join(n.removeprefix("load_") for n in dir(datasets) if n.startswith("load_") and "arff" not in n)
        raise UserError(f"datamodule.cohort.name={name}: scikit-survival has {known}.")
    frame, outcome = loader()
    event, time = (outcome[field] for field in outcome.dtype.names)
    if event.dtype != bool:
        raise UserError(f"datamodule.cohort.name={name}: this cohort has competing events, not one.")
    values: dict[str, Arrays] = {}
    for modality, chosen in modalities.items():
        columns = [c for c in frame.columns if c.startswith(chosen)] if isinstance(chosen, str) else list(chosen)
        if lost := [column for column in columns if column not in frame.columns]:
            raise UserError(f"datamodule.cohort.modalities.{modality}: {name} has no {lost}; it has {[*frame.columns]}.")
        if not columns:
            raise UserError(f"datamodule.cohort.modalities.{modality}: no column of {name} begins with '{chosen}'.")
        parts = [part for column in columns for part in _columns_of(frame[column].to_numpy())]
        values[modality] = Arrays(np.stack(parts, axis=1)[:, None])
    patients = [f"patient {number}" for number in range(len(time))]
    truth = {TIME: time.astype(np.float32), CENSORED: ~event}
    return Cohort(patients, patients, values, truth)


def _columns_of(column: np.ndarray) -> list[np.ndarray]:
    """A column of numbers as it is; of categories one column for each but the first, NaN where the category is unknown."""
    try:
        return [np.asarray(column, np.float32)]
    except (ValueError, TypeError):
        unknown = np.array([value is None or value != value for value in column])
        kinds = sorted({str(value) for value, lost in zip(column, unknown, strict=True) if not lost})
        text = np.array([str(value) for value in column])
        return [np.where(unknown, np.nan, text == kind).astype(np.float32) for kind in kinds[1:] or kinds]
