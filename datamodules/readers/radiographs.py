"""Tables of chest X-ray sets: which image belongs to which patient and split, and what was found in it."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules.readers.base import BadSample, inside
from models.batch import Skipped
from models.errors import UserError

UNKNOWN = -1  # of a finding that a label file leaves open
SPLITS = ("train", "val", "test")
METADATA = ("sex", "view", "age")  # 1 male, 0 female; 1 AP, 0 PA; years
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".dcm", ".dicom")


class RadiographTable(NamedTuple):
    """One row per image.

    Attributes:
        paths: (N,) below the root.
        patients: (N,) whom the image shows; the rows of a patient stay in one split.
        findings: (N, C) int64: 1 present, 0 absent, -1 unknown.
        names: of the C findings.
        splits: (N,) train, val or test; empty where the set does not say.
        skipped: rows of the files that cannot be used.
        metadata: (N, len(METADATA)) float32, NaN where the set does not say.
        reports: (N,) findings in words; empty where the set has none.
        members: of paths inside tars: the tar below the root, the position and the size in bytes.
        runs: of structures whose masks are run-length codes: by path, see :mod:`datamodules.readers.run_lengths`.
    """

    paths: list[str]
    patients: list[str]
    findings: np.ndarray
    names: list[str]
    splits: list[str]
    skipped: list[Skipped]
    metadata: np.ndarray
    reports: list[str]
    members: Mapping[str, tuple[str, int, int]] = {}
    runs: Mapping[str, Mapping[str, np.ndarray]] = {}


class Entry(NamedTuple):
    """One row of a :class:`RadiographTable`; ``metadata`` holds what the set says of :data:`METADATA`."""

    path: str
    patient: str
    findings: Sequence[int]
    split: str = ""
    metadata: Mapping[str, float] = {}
    report: str = ""


Layout = Callable[[Path], RadiographTable]


def image_folder(root: Path) -> RadiographTable:
    """Every image below ``root``, without findings; a folder ``train``, ``val`` or ``test`` at the top is that split.

    Each image is its own patient.
    """
    paths = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"datamodule.root: {root} holds no image ({', '.join(SUFFIXES)}).")
    return as_table([Entry(path, path, (), split_of_folder(path)) for path in paths], ())


def split_of_folder(path: str) -> str:
    """train, val or test where that is the first folder of a path; else empty."""
    top, _, inner = path.partition("/")
    return top if top in SPLITS and inner else ""


NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation",
    "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip


def nih_cxr14(root: Path) -> RadiographTable:
    """ChestX-ray14: ``Data_Entry_2017*.csv``, ``train_val_list.txt``, ``test_list.txt``, ``images*/**/<Image Index>``."""
    table = one_file(root, "Data_Entry_2017*.csv")
    where = {file.name: file.relative_to(root).as_posix() for file in root.glob("images*/**/*.png")}
    split_of: dict[str, str] = {}
    for split, name in (("", "train_val_list.txt"), ("test", "test_list.txt")):
        if (root / name).is_file():
            split_of |= dict.fromkeys((root / name).read_text().split(), split)

    def entry(row: dict[str, str]) -> Entry:
        image = row["Image Index"]
        named = set(row["Finding Labels"].split("|"))
        if unknown := named - {*NIH_FINDINGS, "No Finding"}:
            raise BadSample(f"unknown finding: {sorted(unknown)[0]!r}")
        if image not in where:
            raise BadSample(f"missing image: no images*/**/{image}")
        findings = [int(name in named) for name in NIH_FINDINGS]
        sex = row.get("Patient Gender") or row.get("Patient Sex")
        known = person(sex, row.get("Patient Age"), row.get("View Position"))
        return Entry(where[image], row["Patient ID"], findings, split_of.get(image, ""), known)

    return table_of(read_rows(table), entry, NIH_FINDINGS, "Image Index")


def one_file(root: Path, pattern: str) -> Path:
    """The file of that name below ``root``. Raises UserError where there is none."""
    if not (files := sorted(root.glob(pattern))):
        raise UserError(f"datamodule.root: {root} has no {pattern}. Give the folder that the set was unpacked into.")
    return files[0]


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file, gzipped or not, by the names of its columns."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return csv.DictReader(io.StringIO(raw.decode("utf-8-sig", "replace"), newline=""))


def table_of(
    rows: Iterable[dict[str, str]], read: Callable[[dict[str, str]], Entry], names: Sequence[str], key: str
) -> RadiographTable:
    """The rows that ``read`` understands; the others are skipped with their reason, by the column ``key``."""
    entries: list[Entry] = []
    skipped = []
    for number, row in enumerate(rows):
        try:
            entry = read(row)
            inside("", entry.path)
            entries.append(entry)
        except BadSample as error:
            skipped.append(Skipped(-1, row.get(key) or f"row {number}", str(error)))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            skipped.append(Skipped(-1, row.get(key) or f"row {number}", f"bad row: {error!r}"))
    return as_table(entries, names, skipped)


def as_table(entries: Sequence[Entry], names: Sequence[str], skipped: Sequence[Skipped] = ()) -> RadiographTable:
    """Rows as columns."""
    metadata = [[entry.metadata.get(name, math.nan) for name in METADATA] for entry in entries]
    return RadiographTable(
        paths=[entry.path for entry in entries],
        patients=[entry.patient for entry in entries],
        findings=np.array([entry.findings for entry in entries], dtype=np.int64).reshape(len(entries), len(names)),
        names=list(names),
        splits=[entry.split for entry in entries],
        skipped=list(skipped),
        metadata=np.array(metadata, dtype=np.float32).reshape(len(entries), len(METADATA)),
        reports=[entry.report for entry in entries],
    )


def person(sex: str | None = None, age: str | None = None, view: str | None = None) -> dict[str, float]:
    """The values of :data:`METADATA` in a set's words; what is not understood is left out.

    Args:
        sex: beginning with M or F.
        age: in years, also as ``063Y`` of DICOM.
        view: PA or AP, also as AP_horizontal.
    """
    known: dict[str, float] = {}
    if sex and sex[0].upper() in "MF":
        known["sex"] = float(sex[0].upper() == "M")
    with contextlib.suppress(ValueError):
        known["age"] = float((age or "").strip().rstrip("Yy"))
    if view and view[:2].upper() in ("PA", "AP"):
        known["view"] = float(view[:2].upper() == "AP")
    return {name: value for name, value in known.items() if math.isfinite(value)}


def assign_splits(table: RadiographTable, val_fraction: float, test_fraction: float) -> list[str]:
    """(N,) split of every row: the set's own where it says, else by a hash of the patient.

    A patient who is in the set's own val or test is never drawn for train: all open rows of that patient go there, too.
    A set that has a split of its own is not drawn from for it.
    """
    stated = {patient: split for patient, split in zip(table.patients, table.splits, strict=True) if split}
    present = set(table.splits)
    test = 0.0 if "test" in present else test_fraction
    val = 0.0 if "val" in present else val_fraction

    def drawn(patient: str) -> str:
        share = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
        return "test" if share < test else "val" if share < test + val else "train"

    return [split or stated.get(patient) or drawn(patient) for split, patient in zip(table.splits, table.patients, strict=True)]
