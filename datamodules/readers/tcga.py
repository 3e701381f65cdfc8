"""TCGA as MM-Lego and HEALNet lay it out: a table of omics and survival for each site, and patch features of each slide."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.readers.cohorts import Arrays, Cohort, Modality, PatchFiles
from models.batch import Skipped
from models.errors import UserError
from models.mm_lego.batch import CENSORED, TIME

NOT_READ = re.compile(r"site|oncotree_code|case_id|slide_id|train|Redaction|sample|stage.*|survival_months|censorship|")
KINDS = ("cnv", "rnaseq", "mut")


def tcga(
    root: Path,
    site: str,
    features: Literal["patch_features_kather", "patch_features"] = "patch_features_kather",
    level: int = 2,
    omics: Literal["joint", "by_kind"] = "joint",
) -> Cohort:
    """Slides of a site with their patient's omics and survival.

    Files: ``tcga/omic/tcga_<site>_all_clean.csv.zip`` and ``tcga/wsi/<site>_preprocessed_level<level>/<features>/<slide>.pt``,
    a tensor (n, W) each. The official writer leaves features of earlier slides behind a slide's own. ``patch_counts.csv``
    beside that folder, with the columns slide and patches, says how many are its own.

    Args:
        root: holds ``tcga``.
        site: blca, brca, kirp, ucec, ...
        features: folder of patch features: ResNet-18 of Kather100k (512) or ResNet-50 of ImageNet (2,048).
        level: of the slides.
        omics: one table of age, sex and all genes, or tables of their own for age and sex ("clinical"), copy numbers ("cnv"),
            expression ("rnaseq") and mutations ("mut").

    Raises UserError where a file or column is missing.
    """
    table = root / "tcga" / "omic" / f"tcga_{site}_all_clean.csv.zip"
    names, rows = read_table(table)
    for column in ("case_id", "slide_id", "survival_months", "censorship"):
        if column not in names:
            raise UserError(f"{table} has no column {column}.")
    at = {name: position for position, name in enumerate(names)}
    slides, patients, kept, skipped = [], [], [], []
    for row in rows:
        slide = row[at["slide_id"]].removesuffix(".svs")
        months, censored = _number(row[at["survival_months"]]), _number(row[at["censorship"]])
        if np.isnan(months) or censored not in (0, 1):
            skipped.append(Skipped(-1, slide, "truth: survival_months or censorship is no number"))
            continue
        slides.append(slide)
        patients.append(row[at["case_id"]])
        kept.append(row)
    if not kept:
        raise UserError(f"{table} has no patient with a survival time.")
    columns = [name for name in names if not NOT_READ.fullmatch(name)]
    values = np.array([[_number(row[at[name]]) for name in columns] for row in kept], np.float64)
    modalities: dict[str, Modality] = {}
    for name, chosen in _groups(columns, omics).items():
        modalities[name] = Arrays(values[:, None, [columns.index(column) for column in chosen]])
    folder = root / "tcga" / "wsi" / f"{site}_preprocessed_level{level}"
    files = {path.stem: path for path in sorted((folder / features).glob("*.pt"))}
    if not files:
        raise UserError(f"{folder / features} has no file <slide>.pt of patch features.")
    modalities["slides"] = PatchFiles([files.get(slide) for slide in slides], _counts(folder / "patch_counts.csv"))
    truth = {
        TIME: np.array([_number(row[at["survival_months"]]) for row in kept], np.float32),
        CENSORED: np.array([_number(row[at["censorship"]]) == 1 for row in kept]),
    }
    return Cohort(slides, patients, modalities, truth, skipped=skipped)


def read_table(path: Path) -> tuple[list[str], Iterator[list[str]]]:
    """Header and rows of the single CSV in a zip file, or of a plain CSV. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing.")
    if path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(archive.namelist()[0]).decode("utf-8")
        except (zipfile.BadZipFile, IndexError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no zip file of a CSV: {error}. Fetch it again.") from error
    else:
        text = path.read_text(encoding="utf-8")
    rows = csv.reader(io.StringIO(text))
    header = next(rows, None)
    if not header:
        raise UserError(f"{path} is empty.")
    return header, (row for row in rows if len(row) == len(header))


def _groups(columns: list[str], omics: str) -> dict[str, list[str]]:
    if omics == "joint":
        return {"omics": columns}
    groups: dict[str, list[str]] = {"clinical": [], **{kind: [] for kind in KINDS}}
    for column in columns:
        kind = column.rpartition("_")[2]
        groups[kind if kind in KINDS else "clinical"].append(column)
    return {name: members for name, members in groups.items() if members}


def _counts(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["slide"]: int(row["patches"]) for row in csv.DictReader(file)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return {"True": 1.0, "False": 0.0}.get(text, float("nan"))
