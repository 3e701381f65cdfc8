"""Arrow files of medical images with captions and questions, as ARL's official code writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.arrow import arrow_columns
from datamodules.readers.image_annotations.medical import SPLITS
from datamodules.readers.image_annotations.sample import UNKNOWN, ImageAnnotations, ImageSample, ImageSource, Span, collect
from models.batch import Skipped


def captions(root: str, split: str, names: Sequence[str], findings: Sequence[str] = ("mimic_cxr",)) -> ImageAnnotations:
    """``<name>_<split>.arrow`` of the official code: ``image``, ``caption``, ``txt_ents`` (entities of each caption by their
    characters), ``chexpert`` for some. One row per caption.

    Args:
        root: folder of the files (``pretrain_arrows_umls``, ``finetune_arrows_umls``).
        split: train, val or test.
        names: of the sets: medicat, roco, mimic_cxr; irtr_roco.
        findings: of those, which have the column chexpert.
    """
    samples: list[ImageSample] = []
    skipped: list[Skipped] = []
    links: dict[str, list[Span]] = {}
    medium = 0
    for name in names:
        path = str(Path(root, f"{name}_{split}.arrow"))
        columns = ("caption", "txt_ents", *(("chexpert",) if name in findings else ()))

        def samples_of(numbered: tuple[int, Any], path: str = path, name: str = name) -> Iterator[ImageSample]:
            row, (texts, entities, *labels) = numbered
            of_image = tuple(int(value == 1) for value in labels[0]) if labels else ()
            for i, (text, spans) in enumerate(zip(texts, entities, strict=True)):
                links[text.strip()] = _spans(text, spans)
                source = ImageSource(path, row)
                yield ImageSample(f"{name}_{split}[{row}]#{i}", source, row, (text.strip(),), findings=of_image)

        rows = list(zip(*arrow_columns(path, columns), strict=True))
        part = collect(((f"{path}, row {row}", (row, values)) for row, values in enumerate(rows)), samples_of, (), medium)
        samples += part.samples
        skipped += part.skipped
        medium += len(rows)
    return ImageAnnotations(samples, (), skipped, links)


def questions(root: str, split: str, name: str) -> ImageAnnotations:
    """``vqa_<data set>_<split>.arrow`` of the official code: lists ``questions``, ``answers``, ``answer_labels``,
    ``answer_scores``, ``question_id``, ``answer_type`` (0 closed, 1 open) and ``txt_ents`` of each image.

    Args:
        root: folder of the files (``finetune_arrows_umls``).
        split: train, val or test.
        name: ``vqa_vqa_rad``, ``vqa_slack`` (SLAKE), ``vqa_medvqa_2019`` or ``vqa_medvqa_2021``.
    """
    names: dict[int, str] = {}
    for part in SPLITS:
        for labels, texts in zip(*arrow_columns(Path(root, f"{name}_{part}.arrow"), ("answer_labels", "answers")), strict=True):
            for of_question, answers_of_question in zip(labels, texts, strict=True):
                names.update(zip(of_question, answers_of_question, strict=True))
    answers = tuple(names.get(number, "unknown") for number in range(1 + max(names, default=-1)))
    path = str(Path(root, f"{name}_{split}.arrow"))
    columns = ("questions", "answer_labels", "answer_scores", "question_id", "answer_type", "txt_ents")
    links: dict[str, list[Span]] = {}

    def samples_of(numbered: tuple[int, Any]) -> Iterator[ImageSample]:
        row, values = numbered
        for question, labels, scores, number, kind, spans in zip(*values, strict=True):
            pairs = tuple(zip(labels, scores, strict=True))
            best = max(pairs, key=lambda pair: pair[1])[0] if pairs else UNKNOWN
            links[question] = _spans(question, spans)
            yield ImageSample(
                f"{name}_{split}[{row}]#{number}", ImageSource(path, row), row, question=question, answer=best, scores=pairs,
                group="open" if kind else "closed", number=number,
            )  # fmt: skip

    rows = zip(*arrow_columns(path, columns), strict=True)
    read = collect(((f"{path}, row {row}", (row, values)) for row, values in enumerate(rows)), samples_of, answers)
    return read._replace(links=links)


def melinda(root: str, split: str, label: str = "p_meth_label", classes: int = 7) -> ImageAnnotations:
    """``cls_melinda_<split>.arrow`` of the official code: ``caption``, the four labels as numbers, ``txt_ents``.

    Args:
        root: folder of the files (``finetune_arrows_umls``).
        split: train, val or test.
        label: column of the class, see :func:`~datamodules.readers.image_annotations.medical.melinda`.
        classes: number of its classes, whose names the files do not hold: 85 of i_meth, 45 of p_meth, 15 of i_meth_label.
    """
    path = str(Path(root, f"cls_melinda_{split}.arrow"))
    links: dict[str, list[Span]] = {}

    def samples_of(numbered: tuple[int, Any]) -> Iterator[ImageSample]:
        row, values = numbered
        for i, (text, answer, spans) in enumerate(zip(*values, strict=True)):
            links[text] = _spans(text, spans)
            yield ImageSample(
                f"cls_melinda_{split}[{row}]#{i}", ImageSource(path, row), row, question=text, answer=answer,
                scores=((answer, 1.0),), number=f"{row}.{i}",
            )  # fmt: skip

    rows = zip(*arrow_columns(path, ("caption", label, "txt_ents")), strict=True)
    names = tuple(f"class {number}" for number in range(classes))
    read = collect(((f"{path}, row {row}", (row, values)) for row, values in enumerate(rows)), samples_of, names)
    return read._replace(links=links)


def _spans(text: str, spans: Iterable[Sequence[int]]) -> list[Span]:
    """Entities of a text that is stripped of the space around it."""
    cut = len(text) - len(text.lstrip())
    return [(int(start) - cut, int(end) - cut, int(entity)) for start, end, entity in spans]
