"""Captioned images in their raw formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.base import BadSample, inside
from datamodules.readers.image_annotations.sample import (
    ImageAnnotations,
    ImageSample,
    ImageSource,
    collect,
    existing,
    parts_of,
    unique,
)
from datamodules.readers.text import read_json
from models.errors import UserError

KARPATHY_PARTS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def karpathy(
    root: str, split: str, name: str = "coco", images: str = "", parts: Mapping[str, Sequence[str]] | None = None
) -> ImageAnnotations:
    """Karpathy's splits of COCO and Flickr30k: ``dataset_<name>.json``, one row per caption.

    Args:
        root: folder of the data set.
        split: train, val or test.
        name: ``coco`` or ``flickr30k``.
        images: folder of the images below ``root``; COCO's lie in ``<filepath>/`` of each entry (train2014, val2014).
        parts: splits of the file that make each split; null: Karpathy's own. The official recipes validate on the test split.
    """
    wanted = set(parts_of(split, dict(parts or KARPATHY_PARTS)))

    def samples_of(numbered: tuple[int, Mapping[str, Any]]) -> Iterator[ImageSample]:
        number, record = numbered
        if record["split"] not in wanted:
            return
        source = ImageSource(
            str(inside(root, *(part for part in (images, record.get("filepath", "")) if part), record["filename"]))
        )
        texts = unique(sentence["raw"] for sentence in record["sentences"])
        if not texts:
            raise BadSample(f"no caption: {record['filename']}")
        for i, text in enumerate(texts):
            yield ImageSample(f"{record['filename']}#{i}", source, number, (text,))

    return collect(karpathy_records(root, name), samples_of)


def karpathy_records(root: str, name: str) -> Iterator[tuple[str, tuple[int, Any]]]:
    """(where, (number, entry)) of a Karpathy file. Raises UserError."""
    path = existing(root, f"dataset_{name}.json", f"karpathy/dataset_{name}.json")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{path} has no list 'images': is it one of Karpathy's files?")
    yield from ((f"{path}, image {number}", (number, entry)) for number, entry in enumerate(content["images"]))


def captions_by_file(root: str, name: str) -> dict[str, tuple[str, ...]]:
    """Captions of a Karpathy file by the name of the image file."""
    found = {}
    for _, (_, record) in karpathy_records(root, name):
        found[Path(record["filename"]).name] = unique(sentence["raw"] for sentence in record["sentences"])
    return found
