"""Sentences about images: SNLI-VE (one image) and NLVR2 (two), raw and as Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.arrow import arrow_columns
from datamodules.readers.base import BadSample, inside
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
from datamodules.readers.text import json_lines

ENTAILMENT = ("contradiction", "neutral", "entailment")
TRUTH = ("False", "True")
SNLI_PARTS = {"train": ("train",), "val": ("dev",), "test": ("test",)}
NLVR2_PARTS = {"train": ("train",), "val": ("dev",), "test": ("test1",)}


def snli_ve(
    root: str, split: str, parts: Mapping[str, Sequence[str]] | None = None, images: str = "flickr30k_images"
) -> ImageAnnotations:
    """SNLI-VE: ``snli_ve_{train,dev,test}.jsonl``; the hypothesis (``sentence2``) about the Flickr30k image.

    Args:
        root: folder of the data set.
        split: train, val or test.
        parts: files that make each split; null: train, dev, test.
        images: folder of the images below ``root``.
    """

    def read(part: str) -> ImageAnnotations:
        media: dict[str, int] = {}

        def samples_of(record: Mapping[str, Any]) -> Iterator[ImageSample]:
            name = f"{record['Flickr30K_ID']}".removesuffix(".jpg") + ".jpg"
            source, medium = ImageSource(str(inside(root, images, name))), media.setdefault(name, len(media))
            if record["gold_label"] not in ENTAILMENT:
                raise BadSample(f"no answer: gold_label is {str(record['gold_label'])[:40]!r}")
            answer = ENTAILMENT.index(record["gold_label"])
            yield ImageSample(f"{name}#{len(media)}", source, medium, question=record["sentence2"], answer=answer)

        path = existing(root, f"snli_ve_{part}.jsonl", f"snli_ve/snli_ve_{part}.jsonl")
        return collect(json_lines(path), samples_of, ENTAILMENT)

    return concatenate([read(part) for part in parts_of(split, dict(parts or SNLI_PARTS))])


def arrow_snli(root: str, split: str, parts: Mapping[str, Sequence[str]] | None = None) -> ImageAnnotations:
    """Arrow files ``snli_{train,dev,test}``: ``sentences`` (list of [premise, hypothesis]) and ``labels`` of each image."""

    def read(part: str) -> ImageAnnotations:
        path = str(Path(root, f"snli_{part}.arrow"))

        def samples_of(numbered: tuple[int, Any]) -> Iterator[ImageSample]:
            row, (sentences, labels) = numbered
            for i, ((_, hypothesis), label) in enumerate(zip(sentences, labels, strict=True)):
                yield ImageSample(
                    f"snli_{part}[{row}]#{i}", ImageSource(path, row), row, question=hypothesis, answer=int(label)
                )

        columns = zip(*arrow_columns(path, ("sentences", "labels")), strict=True)
        return collect(((f"{path}, row {row}", (row, values)) for row, values in enumerate(columns)), samples_of, ENTAILMENT)

    return concatenate([read(part) for part in parts_of(split, dict(parts or SNLI_PARTS))])


def nlvr2(root: str, split: str, parts: Mapping[str, Sequence[str]] | None = None, images: str = "images") -> ImageAnnotations:
    """NLVR2: lines of ``{train,dev,test1}.json`` in ``data/`` of the official repository, images
    ``train/<directory>/<id>-img0.png``, ``dev/<id>-img0.png``, ``test1/...``.

    Args:
        root: folder of the data set.
        split: train, val or test.
        parts: files that make each split; null: train, dev, test1.
        images: folder of the images below ``root``.
    """

    def read(part: str) -> ImageAnnotations:
        media: dict[str, int] = {}

        def samples_of(record: Mapping[str, Any]) -> Iterator[ImageSample]:
            pair, _, _ = record["identifier"].rpartition("-")
            folder = (part, str(record["directory"])) if part == "train" else (part,)
            left, right = (ImageSource(str(inside(root, images, *folder, f"{pair}-img{i}.png"))) for i in (0, 1))
            answer = TRUTH.index(record["label"]) if "label" in record else UNKNOWN
            yield ImageSample(
                record["identifier"],
                left,
                media.setdefault(pair, len(media)),
                question=record["sentence"],
                answer=answer,
                second=right,
                number=record["identifier"],
            )

        places = [f"{folder}{part}.json" for folder in ("data/", "nlvr2/data/", "nlvr/nlvr2/data/", "")]
        return collect(json_lines(existing(root, *places)), samples_of, TRUTH)

    return concatenate([read(part) for part in parts_of(split, dict(parts or NLVR2_PARTS))])


def arrow_nlvr2(root: str, split: str, parts: Mapping[str, Sequence[str]] | None = None) -> ImageAnnotations:
    """Arrow files ``nlvr2_{train,dev,test1,...}``: ``image_0``, ``image_1``, ``questions``, ``answers`` (True, False)."""

    def read(part: str) -> ImageAnnotations:
        path = str(Path(root, f"nlvr2_{part}.arrow"))

        def samples_of(numbered: tuple[int, Any]) -> Iterator[ImageSample]:
            row, (questions, answers, identifier) = numbered
            left, right = (ImageSource(path, row, f"image_{i}") for i in (0, 1))
            for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                key, truth = f"nlvr2_{part}[{row}]#{i}", TRUTH.index(str(answer))
                name = identifier if isinstance(identifier, str) else identifier[i]
                yield ImageSample(key, left, row, question=question, answer=truth, second=right, number=name)

        columns = zip(*arrow_columns(path, ("questions", "answers", "identifier")), strict=True)
        return collect(((f"{path}, row {row}", (row, values)) for row, values in enumerate(columns)), samples_of, TRUTH)

    return concatenate([read(part) for part in parts_of(split, dict(parts or NLVR2_PARTS))])
