"""Layouts of further chest X-ray sets, by the public descriptions of their files.

Columns are those that the sets' publications and pages name; no copy of the sets was at hand to check them against.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from datamodules.readers.base import BadSample
from datamodules.readers.images import read_file
from datamodules.readers.radiographs import (
    UNKNOWN,
    Entry,
    RadiographTable,
    one_file,
    person,
    read_rows,
    table_of,
)
from datamodules.readers.run_lengths import parse_runs

CHEXPERT_FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
FRONTAL = {"PA", "AP"}
PADCHEST_FRONTAL = {"PA", "AP", "AP_horizontal"}


def mimic_cxr_jpg(root: Path, frontal: bool = True, reports: bool = False) -> RadiographTable:
    """MIMIC-CXR-JPG: ``mimic-cxr-2.0.0-{metadata,split,chexpert}.csv[.gz]`` beside ``files/pXX/pSUBJECT/sSTUDY/DICOM.jpg``.

    Sex and age come from MIMIC-IV's ``patients.csv[.gz]``, where it lies in the same folder.

    Args:
        root: folder of the set.
        frontal: leave out images whose ViewPosition is neither PA nor AP.
        reports: read ``mimic-cxr-reports/files/pXX/pSUBJECT/sSTUDY.txt`` of MIMIC-CXR, one small file per image: its section
            FINDINGS, else IMPRESSION. A missing file skips the image.
    """
    split_of = {row["dicom_id"]: row["split"] for row in read_rows(one_file(root, "mimic-cxr-2.0.0-split.csv*"))}
    labels = {row["study_id"]: row for row in read_rows(one_file(root, "mimic-cxr-2.0.0-chexpert.csv*"))}
    splits = {"train": "train", "validate": "val", "test": "test"}
    people = {row["subject_id"]: row for file in root.glob("patients.csv*") for row in read_rows(file)}

    def entry(row: dict[str, str]) -> Entry:
        subject, study, dicom = row["subject_id"], row["study_id"], row["dicom_id"]
        path = f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
        study_labels = labels.get(study, {})
        findings = [_chexpert_label(study_labels.get(name, "")) for name in CHEXPERT_FINDINGS]
        record = people.get(subject, {})
        known = person(record.get("gender"), record.get("anchor_age"), row.get("ViewPosition"))
        file = root / "mimic-cxr-reports" / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
        text = report_findings(read_file(file, "report").decode("utf-8", "replace")) if reports else ""
        return Entry(path, subject, findings, splits[split_of[dicom]], known, text)

    rows = read_rows(one_file(root, "mimic-cxr-2.0.0-metadata.csv*"))
    wanted = (row for row in rows if not frontal or row.get("ViewPosition") in FRONTAL)
    return table_of(wanted, entry, CHEXPERT_FINDINGS, "dicom_id")


def chexpert(root: Path, frontal: bool = True) -> RadiographTable:
    """CheXpert: ``train.csv`` and ``valid.csv``, whose column Path begins with the name of the set's folder.

    Args:
        root: folder that holds ``train.csv``.
        frontal: leave out lateral images.
    """

    def read(split: str, file: str) -> RadiographTable:
        def entry(row: dict[str, str]) -> Entry:
            inside_set = row["Path"].partition("/")[2]
            patient = next(part for part in inside_set.split("/") if part.startswith("patient"))
            findings = [_chexpert_label(row[name]) for name in CHEXPERT_FINDINGS]
            known = person(row.get("Sex"), row.get("Age"), row.get("AP/PA"))
            return Entry(inside_set, patient, findings, split, known)

        rows = (row for row in read_rows(one_file(root, file)) if not frontal or row.get("Frontal/Lateral") == "Frontal")
        return table_of(rows, entry, CHEXPERT_FINDINGS, "Path")

    return _joined(read("", "train.csv"), read("test", "valid.csv"))


def padchest(root: Path, frontal: bool = True, least: int = 100) -> RadiographTable:
    """PadChest: ``PADCHEST_chest_x_ray_images_labels_160K*.csv[.gz]`` beside ``<ImageDir>/<ImageID>``.

    Args:
        root: folder of the set.
        frontal: leave out images whose Projection is not PA, AP or AP_horizontal.
        least: images that a finding needs to become a label.
    """
    rows = list(read_rows(one_file(root, "PADCHEST_chest_x_ray_images_labels_160K*.csv*")))
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        for name in _padchest_labels(row, []):
            counts[name] += 1
    names = sorted(name for name, count in counts.items() if count >= least and name not in ("normal", "unchanged", "exclude"))

    def entry(row: dict[str, str]) -> Entry:
        present = set(_padchest_labels(row))
        born, taken = row.get("PatientBirth") or "", row.get("StudyDate_DICOM") or ""
        age = str(float(taken[:4]) - float(born)) if born and taken else None
        known = person(row.get("PatientSex_DICOM"), age, row.get("Projection"))
        findings = [int(name in present) for name in names]
        path = f"{row['ImageDir']}/{row['ImageID']}"
        return Entry(path, row["PatientID"], findings, "", known, (row.get("Report") or "").strip())

    wanted = (row for row in rows if not frontal or row.get("Projection") in PADCHEST_FRONTAL)
    return table_of(wanted, entry, names, "ImageID")


def vindr_cxr(root: Path) -> RadiographTable:
    """VinDr-CXR: ``image_labels_{train,test}.csv`` below ``annotations/``, images ``{train,test}/<image_id>.dicom``.

    Of the three readers of a training image a finding counts as present where most of them saw it. Images have no patient:
    each is its own.
    """

    def read(split: str) -> tuple[list[dict[str, str]], list[str]]:
        rows = list(read_rows(one_file(root, f"**/image_labels_{split}.csv")))
        names = [name for name in (rows[0] if rows else {}) if name not in ("image_id", "rad_id", "rad_ID")]
        return rows, names

    tables = []
    for folder, split in (("train", ""), ("test", "test")):
        rows, names = read(folder)
        votes: dict[str, list[dict[str, str]]] = defaultdict(list)
        for row in rows:
            votes[row["image_id"]].append(row)

        def entry(
            row: dict[str, str],
            votes: dict[str, list[dict[str, str]]] = votes,
            names: list[str] = names,
            place: tuple[str, str] = (folder, split),
        ) -> Entry:
            readers = votes[row["image_id"]]
            seen = [2 * sum(float(reader[name]) > 0 for reader in readers) > len(readers) for name in names]
            path = f"{place[0]}/{row['image_id']}.dicom"
            return Entry(path, row["image_id"], [int(value) for value in seen], place[1])

        tables.append(table_of([readers[0] for readers in votes.values()], entry, names, "image_id"))
    return _joined(*tables)


def rsna_pneumonia(root: Path) -> RadiographTable:
    """RSNA pneumonia challenge: ``stage_2_train_labels.csv`` (a row per box) and ``stage_2_train_images/<patientId>.dcm``.

    The test images of the challenge have no labels and are not read.
    """
    present: dict[str, int] = {}
    for row in read_rows(one_file(root, "stage_2_train_labels.csv")):
        present[row["patientId"]] = max(present.get(row["patientId"], 0), int(row["Target"]))

    def entry(row: dict[str, str]) -> Entry:
        patient = row["patientId"]
        return Entry(f"stage_2_train_images/{patient}.dcm", patient, [present[patient]])

    return table_of(({"patientId": patient} for patient in present), entry, ["Pneumonia"], "patientId")


def candid_ptx(root: Path) -> RadiographTable:
    """CANDID-PTX: ``Pneumothorax_reports.csv`` (SOPInstanceUID, EncodedPixels) and ``dataset/<SOPInstanceUID>.dcm``.

    An image has a row for each region of its pneumothorax, whose codes make the masks of the structure ``pneumothorax``.
    Chest tubes and rib fractures are in further files of the set, which are not read. Each image is its own patient, unless the
    column PseudoPatientID says whose it is.
    """
    codes: dict[str, list[str]] = defaultdict(list)
    patients: dict[str, str] = {}
    for row in read_rows(one_file(root, "Pneumothorax_reports.csv")):
        name = row["SOPInstanceUID"]
        codes[name].append(row["EncodedPixels"] or "")
        patients[name] = row.get("PseudoPatientID") or name
    runs: dict[str, np.ndarray] = {}

    def entry(row: dict[str, str]) -> Entry:
        name = row["SOPInstanceUID"]
        path = f"dataset/{name}.dcm"
        runs[path] = np.concatenate([parse_runs(code) for code in codes[name]])
        return Entry(path, patients[name], [int(len(runs[path]) > 0)])

    table = table_of(({"SOPInstanceUID": name} for name in codes), entry, ["Pneumothorax"], "SOPInstanceUID")
    return table._replace(runs={"pneumothorax": runs})


def report_findings(text: str) -> str:
    """The section FINDINGS of a report, else IMPRESSION, in one line; empty where it has neither."""
    sections = re.split(r"^ *([A-Z][A-Z /]+):", text, flags=re.MULTILINE)
    by_name = {name.strip(): " ".join(body.split()) for name, body in zip(sections[1::2], sections[2::2], strict=True)}
    return by_name.get("FINDINGS") or by_name.get("IMPRESSION") or ""


def _chexpert_label(value: str) -> int:
    """1.0 present, 0.0 absent, -1.0 uncertain; what a report does not mention counts as absent."""
    number = float(value) if value.strip() else 0.0
    if number not in (1.0, 0.0, -1.0):
        raise BadSample(f"bad row: a label is {value!r}")
    return UNKNOWN if number < 0 else int(number)


def _padchest_labels(row: dict[str, str], default: list[str] | None = None) -> list[str]:
    """The list that the column Labels holds as Python writes it. Raises BadSample without a ``default``."""
    try:
        names = ast.literal_eval(row["Labels"])
    except (ValueError, SyntaxError, TypeError) as error:
        if default is None:
            raise BadSample(f"bad row: Labels is {str(row.get('Labels'))[:60]!r}") from error
        return default
    return [str(name).strip() for name in names if str(name).strip()]


def _joined(*tables: RadiographTable) -> RadiographTable:
    first = tables[0]
    columns = [[table.names.index(name) if name in table.names else -1 for name in first.names] for table in tables]
    findings = [
        np.where(np.array(column) >= 0, table.findings[:, column], UNKNOWN)
        for table, column in zip(tables, columns, strict=True)
    ]
    return RadiographTable(
        [path for table in tables for path in table.paths],
        [patient for table in tables for patient in table.patients],
        np.concatenate(findings),
        first.names,
        [split for table in tables for split in table.splits],
        [entry for table in tables for entry in table.skipped],
        np.concatenate([table.metadata for table in tables]),
        [report for table in tables for report in table.reports],
    )
