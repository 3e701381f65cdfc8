"""Captions from the web beside images that users have fetched themselves: Conceptual Captions and SBU.

A published file lists captions and URLs; an image that could be fetched bears the number of its entry, from 0, as its name. A
good part of the URLs is dead, so that an entry without an image is no error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.base import BadSample
from datamodules.readers.image_annotations.sample import (
    ImageAnnotations,
    ImageSample,
    ImageSource,
    collect,
    existing,
    parts_of,
    unique,
)
from datamodules.readers.text import read_json, read_lines
from models.errors import UserError

NUMBER = re.compile(r"(\d+)(?=[._]|$)")


def conceptual_captions(root: str, split: str) -> ImageAnnotations:
    """CC3M as published: ``Train_GCC-training.tsv`` and ``Validation_GCC-1.1.0-Validation.tsv`` (caption, URL).

    Args:
        root: folder of the files, with the images below ``training/`` and ``validation/``, see :func:`numbered_images`.
        split: train or val.
    """
    parts: dict[str, Sequence[str]] = {
        "train": ("Train_GCC-training.tsv", "training"),
        "val": ("Validation_GCC-1.1.0-Validation.tsv", "validation"),
    }
    file, folder = parts_of(split, parts)
    path = existing(root, file)
    rows = (line.split("\t")[0] for line in read_lines(path))
    return _fetched(path, rows, Path(root, folder))


def sbu(root: str, split: str) -> ImageAnnotations:
    """SBU's captioned photos as published: ``sbu-captions-all.json`` with the lists ``captions`` and ``image_urls``.

    Args:
        root: folder of the file, with the images below ``sbu/``, see :func:`numbered_images`.
        split: train alone.
    """
    parts_of(split, {"train": ("all",)})
    path = existing(root, "sbu-captions-all.json")
    content = read_json(path)
    captions = content.get("captions") if isinstance(content, dict) else None
    if not isinstance(captions, list):
        raise UserError(f"{path} has no list 'captions': is it SBU's file?")
    return _fetched(path, captions, Path(root, "sbu"))


def numbered_images(folder: Path) -> dict[int, str]:
    """Number of an entry -> its image below ``folder``, at any depth: ``12``, ``0000012.jpg`` and ``12_<checksum>`` are
    entry 12. Raises UserError where there is none."""
    images: dict[int, str] = {}
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if number := NUMBER.match(name):
                images.setdefault(int(number[1]), os.path.join(place, name))
    if not images:
        raise UserError(
            f"there is no image in {folder} that bears the number of its entry, such as 0000012.jpg. Fetch the images, or "
            "correct datamodule.root."
        )
    return images


def _fetched(path: Path, captions: Iterable[Any], folder: Path) -> ImageAnnotations:
    """One row for each entry whose image is there."""
    images = numbered_images(folder)

    def samples_of(entry: tuple[int, Any]) -> Iterator[ImageSample]:
        number, caption = entry
        texts = unique([caption])
        if not texts:
            raise BadSample(f"no caption: entry {number} of {path}")
        yield ImageSample(f"{folder.name}/{number}", ImageSource(images[number]), number, texts)

    entries = ((f"{path}, entry {i}", (i, caption)) for i, caption in enumerate(captions) if i in images)
    return collect(entries, samples_of)
