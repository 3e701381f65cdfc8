"""Questions about images in their raw formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datamodules.readers.arrow import arrow_columns, open_table
from datamodules.readers.base import inside
from datamodules.readers.image_annotations.captions import captions_by_file, image_folders
from datamodules.readers.image_annotations.sample import (
    UNKNOWN,
    ImageAnnotations,
    ImageSample,
    ImageSource,
    collect,
    concatenate,
    existing,
    parts_of,
)
from datamodules.readers.text import read_json
from models.errors import UserError
from models.two_tower.answers import MIN_COUNT, answer_vocabulary, normalise_answer, soft_scores

VOCABULARY_PARTS = ("train2014", "val2014")  # 3,129 answers
VQA_PARTS = {"train": ("train2014",), "test": ("val2014",)}


def vqa_v2(
    root: str,
    split: str,
    parts: Mapping[str, Sequence[str]] | None = None,
    vocabulary_parts: Sequence[str] = VOCABULARY_PARTS,
    min_count: int = MIN_COUNT,
    group_by: Literal["answer_type", "question_type"] = "answer_type",
    captions: str | None = None,
    normalise: bool = True,
) -> ImageAnnotations:
    """VQAv2: ``v2_OpenEnded_mscoco_<part>_questions.json`` and ``v2_mscoco_<part>_annotations.json`` in ``root`` or
    ``root/vqav2``; images ``<part>/COCO_<part>_<id>.jpg`` in ``root``.

    Questions without an answer in the vocabulary are left out of splits that have answers, but for the test split, where they
    count as wrong.

    Args:
        root: folder of the data set.
        split: train, val or test.
        parts: subsets that make each split; null: train on train2014, test on val2014. The official recipe trains on both,
            validates on val2014, which is in it, and tests on test2015.
        vocabulary_parts: subsets whose answers make the vocabulary.
        min_count: of an answer in the vocabulary.
        group_by: field of the annotations that names the kind of question.
        captions: ``coco``: give the captions of ``dataset_coco.json`` with the questions of an image.
        normalise: see :func:`~models.two_tower.answers.soft_scores`.
    """
    subsets = parts_of(split, dict(parts or VQA_PARTS))
    chosen = (
        annotation["multiple_choice_answer"] for part in vocabulary_parts for annotation in _annotations(root, part).values()
    )
    answers = tuple(answer_vocabulary(chosen, min_count))
    numbers = {answer: number for number, answer in enumerate(answers)}
    texts = captions_by_file(root, captions) if captions else {}

    def read(part: str) -> ImageAnnotations:
        folder = "test2015" if part.startswith("test") else part
        annotations = _annotations(root, part)
        media: dict[int, int] = {}

        def samples_of(record: Mapping[str, Any]) -> Iterator[ImageSample]:
            image, number = int(record["image_id"]), int(record["question_id"])
            name = f"COCO_{folder}_{image:012d}.jpg"
            source = ImageSource(str(inside(root, folder, name)))
            scores: tuple[tuple[int, float], ...] = ()
            group = ""
            if annotation := annotations.get(number):
                scores = tuple(soft_scores([a["answer"] for a in annotation["answers"]], numbers, normalise).items())
                group = annotation.get(group_by, "")
                if not scores and split != "test":
                    return
            best = max(scores, key=lambda pair: pair[1])[0] if scores else UNKNOWN
            medium = media.setdefault(image, len(media))
            yield ImageSample(
                f"{name}#{number}", source, medium, texts.get(name, ()), record["question"], best, scores, group, number=number
            )

        return collect(_questions(root, part), samples_of, answers)

    return concatenate([read(part) for part in subsets])


def _questions(root: str, part: str) -> Iterator[tuple[str, Any]]:
    name = f"v2_OpenEnded_mscoco_{part}_questions.json"
    path = existing(root, name, f"vqav2/{name}")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
        raise UserError(f"{path} has no list 'questions': is it VQAv2's file?")
    yield from ((f"{path}, question {number}", record) for number, record in enumerate(content["questions"]))


def _annotations(root: str, part: str) -> dict[int, Any]:
    """Annotations by question; none for a test set whose answers are hidden."""
    name = f"v2_mscoco_{part}_annotations.json"
    try:
        path = existing(root, name, f"vqav2/{name}")
    except UserError:
        if part.startswith("test"):
            return {}
        raise
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(f"{path} has no list 'annotations': is it VQAv2's file?")
    return {int(entry["question_id"]): entry for entry in content["annotations"]}


def vg_qa(
    root: str, split: str, vqa_root: str | None = None, min_count: int = MIN_COUNT, normalise: bool = True
) -> ImageAnnotations:
    """Visual Genome's questions: ``question_answers.json``, images in ``VG_100K`` and ``VG_100K_2``. Train only.

    Kept are those whose answer is in VQAv2's vocabulary, with a score of 1.

    Args:
        root: folder of Visual Genome.
        split: train; others do not exist.
        vqa_root: folder of VQAv2, whose answers make the vocabulary; None: ``root`` too.
        min_count: see :func:`vqa_v2`.
        normalise: see :func:`~models.two_tower.answers.soft_scores`.
    """
    parts_of(split, {"train": ("train",)})
    chosen = (
        entry["multiple_choice_answer"] for part in VOCABULARY_PARTS for entry in _annotations(vqa_root or root, part).values()
    )
    answers = tuple(answer_vocabulary(chosen, min_count))
    numbers = {answer: number for number, answer in enumerate(answers)}
    folders = image_folders(root, ("VG_100K", "VG_100K_2"))

    def samples_of(numbered: tuple[int, Mapping[str, Any]]) -> Iterator[ImageSample]:
        medium, record = numbered
        for pair in record["qas"]:
            answer = numbers.get(normalise_answer(pair["answer"]) if normalise else pair["answer"])
            if answer is not None:
                name = f"{pair['image_id']}.jpg"
                yield ImageSample(
                    f"{name}#{pair['qa_id']}",
                    ImageSource(folders(name)),
                    medium,
                    question=pair["question"],
                    answer=answer,
                    scores=((answer, 1.0),),
                    number=pair["qa_id"],
                )

    path = existing(root, "question_answers.json", "annotations/question_answers.json")
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} holds no list of images: is it Visual Genome's question_answers.json?")
    return collect(((f"{path}, image {i}", (i, record)) for i, record in enumerate(content)), samples_of, answers)


def arrow_questions(
    root: str, split: str, parts: Mapping[str, Sequence[str]], vocabulary_parts: Sequence[str], classes: int = 3129
) -> ImageAnnotations:
    """Arrow files of questions as ViLT, METER and BridgeTower write them (``vqav2_*``, ``vgqa_*``): lists ``questions``,
    ``question_id``, ``answers``, ``answer_labels`` and ``answer_scores`` of each image.

    Args:
        root: folder of the files.
        split: train, val or test.
        parts: names of the files of each split, without ``.arrow``.
        vocabulary_parts: files whose answers name the classes; a class that none of them has is called "unknown".
        classes: number of answers.
    """
    names: dict[int, str] = {}
    for name in vocabulary_parts:
        for labels, texts in zip(*arrow_columns(_arrow(root, name), ("answer_labels", "answers")), strict=True):
            for of_question, answers_of_question in zip(labels, texts, strict=True):
                names.update(zip(of_question, answers_of_question, strict=True))
    answers = tuple(names.get(number, "unknown") for number in range(classes))

    def read(name: str) -> ImageAnnotations:
        path = _arrow(root, name)
        columns = ["questions", "question_id"]
        has_answers = {"answer_labels", "answer_scores"} <= set(open_table(path).column_names)
        columns += ["answer_labels", "answer_scores"] if has_answers else []

        def samples_of(numbered: tuple[int, Any]) -> Iterator[ImageSample]:
            row, (questions, ids, *targets) = numbered
            for i, question in enumerate(questions):
                scores: tuple[tuple[int, float], ...] = ()
                if targets and targets[0] and len(targets[0]) > i:
                    scores = tuple(zip(targets[0][i], targets[1][i], strict=True))
                best = max(scores, key=lambda pair: pair[1])[0] if scores else UNKNOWN
                source = ImageSource(path, row)
                yield ImageSample(
                    f"{name}[{row}]#{ids[i]}", source, row, question=question, answer=best, scores=scores, number=ids[i]
                )

        rows = zip(*arrow_columns(path, columns), strict=True)
        return collect(((f"{path}, row {row}", (row, values)) for row, values in enumerate(rows)), samples_of, answers)

    return concatenate([read(name) for name in parts_of(split, dict(parts))])


def _arrow(root: str, name: str) -> str:
    return str(Path(root, f"{name}.arrow"))
