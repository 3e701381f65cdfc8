"""Medical images with captions and questions, in the raw layouts that ARL's official code reads."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.readers.base import BadSample, inside
from datamodules.readers.image_annotations.sample import (
    UNKNOWN,
    ImageAnnotations,
    ImageSample,
    ImageSource,
    collect,
    existing,
    parts_of,
    unique,
)
from datamodules.readers.radiograph_sets import CHEXPERT_FINDINGS, FRONTAL
from datamodules.readers.radiographs import one_file, read_rows
from datamodules.readers.text import json_lines, read_json, read_lines
from models.errors import UserError
from models.two_tower.answers import normalise_answer

SPLITS = ("train", "val", "test")
SEED = 42  # of the official code's own splits
RETRIEVAL_IMAGES = 2000  # of ROCO's val and test
MEDICAT_HELD_OUT = 1000  # of MedICaT's val and of its test
LEAST_WORDS = 3  # of a part of a report
MEDVQA_QUESTIONS = ("Modality", "Organ", "Plane")
MELINDA_LABELS = ("i_meth", "p_meth", "i_meth_label", "p_meth_label")


# ---- captions --------------------------------------------------------------------------------------------------------


def roco(root: str, split: str, folder: str = "", retrieval: bool = False) -> ImageAnnotations:
    """ROCO: ``<split>/radiology/captions.txt`` (name, tab, caption) and ``<split>/radiology/images/<name>.jpg``.

    Args:
        root: folder of the data set, or with ``folder`` of several.
        split: train, val or test.
        folder: of the data set below ``root``.
        retrieval: of val and test the first 2,000 lines of the official order alone.
    """
    place = Path(root, folder)
    numbers = _shuffled_lines(place)[split] if retrieval else None
    records = list(_roco_lines(place, split))
    if numbers is not None:
        records = [records[number] for number in (numbers if split == "train" else numbers[:RETRIEVAL_IMAGES])]

    def samples_of(numbered: tuple[int, list[str]]) -> Iterator[ImageSample]:
        number, row = numbered
        name, caption = row[0].strip(), row[1].strip()
        yield ImageSample(f"{split}/{name}", _roco_image(place, split, name), number, (caption,))

    return collect(((f"{split}/radiology/captions.txt, line {i + 1}", (i, row)) for i, row in records), samples_of)


def _roco_lines(place: Path, split: str) -> Iterator[tuple[int, list[str]]]:
    lines = read_lines(existing(place, f"{split}/radiology/captions.txt"))
    return ((number, line.split("\t", 1)) for number, line in enumerate(lines) if line.strip())


def _shuffled_lines(place: Path) -> dict[str, list[int]]:
    """The official order of the lines: one shuffle for each split, one generator for all."""
    drawn = random.Random(SEED)
    orders = {}
    for split in SPLITS:
        order = list(range(len(list(_roco_lines(place, split)))))
        drawn.shuffle(order)
        orders[split] = order
    return orders


def _roco_image(place: Path, split: str, name: str) -> ImageSource:
    return ImageSource(str(inside(place, split, "radiology", "images", f"{name}.jpg")))


def medicat(root: str, split: str, folder: str = "") -> ImageAnnotations:
    """MedICaT: ``release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl`` and ``release/figures/``.

    Radiological figures alone, one row for the caption and each reference in the paper. The last 2,000 of the official order of
    the figures are val and test. References of ROCO's figures (``net/``) are not read.

    Args:
        root: folder of the data set, or with ``folder`` of several.
        split: train, val or test.
        folder: of the data set below ``root``.
    """
    place = Path(root, folder)
    path = existing(place, "release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl")
    records = [(where, record) for where, record in json_lines(path) if isinstance(record, dict) and record.get("radiology")]
    order = list(range(len(records)))
    random.Random(SEED).shuffle(order)
    held_out = len(order) - 2 * MEDICAT_HELD_OUT
    ends = {"train": (0, held_out), "val": (held_out, held_out + MEDICAT_HELD_OUT), "test": (held_out + MEDICAT_HELD_OUT, None)}
    first, last = ends[split]
    if held_out < 1:
        raise UserError(f"{path} has {len(order)} radiological figures; {2 * MEDICAT_HELD_OUT} are held out: is it complete?")

    def samples_of(numbered: tuple[int, Mapping[str, Any]]) -> Iterator[ImageSample]:
        number, record = numbered
        name = f"{record['pdf_hash']}_{record['fig_uri']}"
        source = ImageSource(str(inside(place, "release", "figures", name)))
        texts = unique([record.get("s2_caption"), *(record.get("s2orc_references") or ())])
        if not texts:
            raise BadSample(f"no caption: {name}")
        for i, text in enumerate(texts):
            yield ImageSample(f"{name}#{i}", source, number, (text,))

    chosen = [records[number] for number in order[first:last]]
    return collect(((where, (i, record)) for i, (where, record) in enumerate(chosen)), samples_of)


def mimic_cxr(root: str, split: str, folder: str = "") -> ImageAnnotations:
    """MIMIC-CXR: ``mimic_cxr_sectioned.csv``, ``mimic-cxr-2.0.0-{split,metadata,chexpert}.csv[.gz]`` and
    ``files/pXX/pSUBJECT/sSTUDY/<dicom>.png`` or ``.jpg``.

    Frontal images (PA, AP) of studies with CheXpert labels, one row for the impression and one for the findings, each of at
    least three words. The split is the data set's own, by patients.

    Args:
        root: folder of the data set, or with ``folder`` of several.
        split: train, val or test.
        folder: of the data set below ``root``.
    """
    place = Path(root, folder)
    name = {"train": "train", "val": "validate", "test": "test"}[split]
    splits = {row["dicom_id"]: row["split"] for row in read_rows(one_file(place, "mimic-cxr-2.0.0-split.csv*"))}
    labels = {row["study_id"]: row for row in read_rows(one_file(place, "mimic-cxr-2.0.0-chexpert.csv*"))}
    reports = {row["study"].lstrip("s"): row for row in read_rows(one_file(place, "mimic_cxr_sectioned.csv*"))}

    def samples_of(numbered: tuple[int, Mapping[str, str]]) -> Iterator[ImageSample]:
        number, row = numbered
        study, subject, dicom = row["study_id"], row["subject_id"], row["dicom_id"]
        if splits.get(dicom) != name or row.get("ViewPosition") not in FRONTAL or study not in labels:
            return
        report = reports[study]
        texts = [" ".join((report.get(part) or "").split()) for part in ("impression", "findings")]
        findings = tuple(int(float(labels[study].get(finding) or 0) == 1) for finding in CHEXPERT_FINDINGS)
        stem = f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}"
        path = next((path for path in (Path(place, stem + end) for end in (".png", ".jpg")) if path.is_file()), None)
        for i, text in enumerate(dict.fromkeys(texts)):
            if len(text.split()) >= LEAST_WORDS:
                source = ImageSource(str(path or inside(place, stem + ".png")))
                yield ImageSample(f"{stem}#{i}", source, number, (text,), findings=findings)

    rows = enumerate(read_rows(one_file(place, "mimic-cxr-2.0.0-metadata.csv*")))
    return collect(((row.get("dicom_id") or f"row {number}", (number, row)) for number, row in rows), samples_of)


# ---- questions -------------------------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """A question in a form that all data sets share."""

    image: ImageSource
    name: str  # of the image
    number: Any
    question: str
    answer: Any
    kind: str


def _questions(
    records: Callable[[str], Iterable[tuple[str, Any]]],
    asked: Callable[[Any], _Asked],
    split: str,
    answers_of: Sequence[str],
    captions: Mapping[str, tuple[str, ...]] | None = None,
) -> ImageAnnotations:
    """The rows of ``split`` and the answers of the splits ``answers_of``, in the order in which they appear.

    Args:
        records: ``split -> (where, record)`` of all questions; raises MissingSplit.
        asked: reads a record.
        split: train, val or test.
        answers_of: splits whose answers are classes; an answer of another one is UNKNOWN.
        captions: of the images, by name.
    """
    numbers: dict[str, int] = {}
    for part in answers_of:
        for _, record in records(part):
            with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # counted where its split is read
                numbers.setdefault(_normalised(asked(record).answer), len(numbers))
    media: dict[ImageSource, int] = {}

    def samples_of(record: Any) -> Iterator[ImageSample]:
        row = asked(record)
        answer = numbers.get(_normalised(row.answer), UNKNOWN)
        scores = ((answer, 1.0),) if answer != UNKNOWN else ()
        medium = media.setdefault(row.image, len(media))
        texts = () if captions is None else captions.get(row.name, ())
        key = f"{row.name}#{row.number}"
        yield ImageSample(key, row.image, medium, texts, row.question, answer, scores, row.kind, number=row.number)

    return collect(records(split), samples_of, tuple(numbers))


def _normalised(answer: Any) -> str:
    return normalise_answer(str(answer).lower())


def _of_json(root: str, folder: str, image: str) -> Callable[[Any], _Asked]:
    """Reads a record of VQA-RAD or SLAKE, whose images lie in ``folder`` under the name in the field ``image``."""

    def asked(record: Mapping[str, Any]) -> _Asked:
        name, kind = record[image], str(record["answer_type"]).strip().lower()
        source = ImageSource(str(inside(root, folder, name)))
        return _Asked(source, name, record["qid"], record["question"], record["answer"], kind)

    return asked


def vqa_rad(root: str, split: str, answers_of: Sequence[str] = ("train",)) -> ImageAnnotations:
    """VQA-RAD: ``{trainset,valset,testset}.json`` and ``images/``.

    Args:
        root: folder of the data set.
        split: train, val or test.
        answers_of: splits whose answers are classes; officially all three.
    """
    return _questions(
        lambda part: _records(root, f"{part}set.json", part), _of_json(root, "images", "image_name"), split, answers_of
    )


def slake(
    root: str, split: str, answers_of: Sequence[str] = ("train",), language: str = "en", captions: bool = False
) -> ImageAnnotations:
    """SLAKE: ``{train,validate,test}.json`` and ``imgs/``.

    Args:
        root: folder of the data set.
        split: train, val or test.
        answers_of: splits whose answers are classes; officially all three.
        language: of the questions.
        captions: give the lines of ``captions.txt`` (name of the image, tab, caption) with the questions about an image.
    """
    files = {"train": "train.json", "val": "validate.json", "test": "test.json"}

    def records(part: str) -> Iterator[tuple[str, Any]]:
        for where, record in _records(root, files[part], part):
            if not isinstance(record, dict) or record.get("q_lang", language) == language:
                yield where, record

    texts: dict[str, tuple[str, ...]] | None = None
    if captions:
        texts = {}
        for line in read_lines(existing(root, "captions.txt")):
            name, _, caption = line.partition("\t")
            texts[name] = (*texts.get(name, ()), caption.strip())
    return _questions(records, _of_json(root, "imgs", "img_name"), split, answers_of, texts)


def medvqa_2019(root: str, split: str, answers_of: Sequence[str] = ("train",)) -> ImageAnnotations:
    """MedVQA-2019: ``<split>/QA/{Modality,Organ,Plane}.csv`` (image|question|answer) and ``<split>/images/<image>.jpg``.

    Questions whose answer is yes or no are closed. Questions about abnormalities are left out, as officially.

    Args:
        root: folder of the data set.
        split: train, val or test.
        answers_of: splits whose answers are classes; officially all three.
    """

    def records(part: str) -> Iterator[tuple[str, Any]]:
        for category in MEDVQA_QUESTIONS:
            path = existing(root, f"{part}/QA/{category}.csv")
            for number, line in enumerate(read_lines(path), 1):
                if line.strip():
                    yield f"{path}, line {number}", (part, f"{category}{number}", line.split("|"))

    def asked(record: tuple[str, str, list[str]]) -> _Asked:
        part, number, (image, question, answer) = record
        kind = "closed" if answer.strip().lower() in ("yes", "no") else "open"
        return _Asked(ImageSource(str(inside(root, part, "images", f"{image}.jpg"))), image, number, question, answer, kind)

    return _questions(records, asked, split, answers_of)


def _records(root: str, name: str, split: str) -> Iterator[tuple[str, Any]]:
    if split == "val" and not Path(root, name).is_file():  # the datamodule holds one out
        parts_of(split, {})
    path = existing(root, name)
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} holds no list of questions.")
    yield from ((f"{path}, question {number}", record) for number, record in enumerate(content))


# ---- classes of pairs ------------------------------------------------------------------------------------------------


def melinda(root: str, split: str, label: str = "p_meth_label") -> ImageAnnotations:
    """MELINDA: ``{train,dev,test}.csv`` and ``melinda_images/``; classes are the sorted names of all splits.

    Args:
        root: folder of the data set.
        split: train, val or test.
        label: column of the class, one of i_meth, p_meth, i_meth_label and p_meth_label (the paper's).
    """
    if label not in MELINDA_LABELS:
        raise UserError(f"label={label} is none of {', '.join(MELINDA_LABELS)}.")
    files = {"train": "train.csv", "val": "dev.csv", "test": "test.csv"}
    rows = {part: list(read_rows(existing(root, name))) for part, name in files.items()}
    names = sorted({row[label] for of_part in rows.values() for row in of_part if row.get(label)})
    media: dict[str, int] = {}

    def samples_of(numbered: tuple[int, Mapping[str, str]]) -> Iterator[ImageSample]:
        number, row = numbered
        file, answer = row["figure_file"], names.index(row[label])
        source = ImageSource(str(inside(root, "melinda_images", file)))
        medium = media.setdefault(file, len(media))
        yield ImageSample(
            f"{file}#{number}", source, medium, question=row["caption"], answer=answer, scores=((answer, 1.0),), number=number
        )

    return collect(((f"{files[split]}, row {i + 1}", (i, row)) for i, row in enumerate(rows[split])), samples_of, tuple(names))
