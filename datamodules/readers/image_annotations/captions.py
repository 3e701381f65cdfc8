"""Captioned images in their raw formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.arrow import arrow_columns
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
from models.batch import Skipped
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
    """Captions of a Karpathy file by the name of the image file. Raises UserError at an entry of another form."""
    captions = {}
    for where, (_, record) in karpathy_records(root, name):
        try:
            captions[Path(record["filename"]).name] = unique(sentence["raw"] for sentence in record["sentences"])
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{where} is no image with a filename and sentences ({error!r}).") from None
    return captions


def visual_genome(root: str, split: str) -> ImageAnnotations:
    """Visual Genome's regions: ``region_descriptions.json``, images in ``VG_100K`` and ``VG_100K_2``.

    One row per phrase; train only.
    """
    parts_of(split, {"train": ("train",)})
    folders = image_folders(root, ("VG_100K", "VG_100K_2"))

    def samples_of(numbered: tuple[int, Mapping[str, Any]]) -> Iterator[ImageSample]:
        number, record = numbered
        name = f"{record['regions'][0]['image_id'] if record['regions'] else record['id']}.jpg"
        for i, phrase in enumerate(unique(region["phrase"] for region in record["regions"])):
            yield ImageSample(f"{name}#{i}", ImageSource(folders(name)), number, (phrase,))

    path = existing(root, "region_descriptions.json", "annotations/region_descriptions.json")
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path} holds no list of images: is it Visual Genome's region_descriptions.json?")
    return collect(((f"{path}, image {i}", (i, record)) for i, record in enumerate(content)), samples_of)


def image_folders(root: str, folders: Sequence[str]) -> Callable[[str], str]:
    """``name -> path`` of images that lie in one of several folders; the first folder where there is no such image."""
    present = [Path(root, folder) for folder in folders if Path(root, folder).is_dir()]
    listings = [(path.name, {entry.name for entry in path.iterdir()}) for path in present]

    def place(name: str) -> str:
        folder = next((folder for folder, names in listings if name in names), folders[0])
        return str(inside(root, folder, name))

    return place


def arrow_captions(root: str, split: str, parts: Mapping[str, Sequence[str]]) -> ImageAnnotations:
    """Arrow files of captioned images as ViLT, METER and BridgeTower write them: columns ``image`` and ``caption`` (a list of
    texts). One row per caption.

    Args:
        root: folder of the files.
        split: train, val or test.
        parts: names of the files of each split, without ``.arrow``. The official recipes validate on the test split.
    """
    samples: list[ImageSample] = []
    medium = 0
    skipped: list[Skipped] = []
    for name in parts_of(split, dict(parts)):
        path = str(Path(root, f"{name}.arrow"))
        (captions,) = arrow_columns(path, ("caption",))

        def samples_of(numbered: tuple[int, Any], path: str = path, name: str = name) -> Iterator[ImageSample]:
            row, texts = numbered
            texts = unique([texts] if isinstance(texts, str) else texts)
            if not texts:
                raise BadSample(f"no caption: row {row} of {path}")
            for i, text in enumerate(texts):
                yield ImageSample(f"{name}[{row}]#{i}", ImageSource(path, row), row, (text,))

        numbered = ((f"{path}, row {row}", (row, texts)) for row, texts in enumerate(captions))
        part = collect(numbered, samples_of, first_medium=medium)
        samples += part.samples
        skipped += part.skipped
        medium += len(captions)
    return ImageAnnotations(samples, (), skipped)
