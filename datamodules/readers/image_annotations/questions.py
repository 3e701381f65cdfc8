"""Questions about images in their raw formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from datamodules.readers.base import inside
from datamodules.readers.image_annotations.captions import captions_by_file
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
from models.two_tower.answers import MIN_COUNT, answer_vocabulary, soft_scores

VQA_PARTS = {"train": ("train2014",), "test": ("val2014",)}


def vqa_v2(
    root: str,
    split: str,
    parts: Mapping[str, Sequence[str]] | None = None,
    vocabulary_parts: Sequence[str] = ("train2014", "val2014"),
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
