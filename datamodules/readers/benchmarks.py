"""Readers of the benchmarks' official layouts. What is missing or malformed is a UserError that says where to put what."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.readers.base import BadSample, inside
from datamodules.readers.images import open_image, open_required
from datamodules.readers.text import json_lines, read_names, read_text
from datamodules.readers.voc import VocSegmentation, class_numbers
from models.errors import UserError

WINOGROUND_LAYOUT = """Winoground (facebook/winoground, gated: accept its terms, then hf download facebook/winoground
--repo-type dataset --local-dir DIR) is DIR/data/examples.jsonl with DIR/data/images.zip or DIR/data/images/*.png"""
MMVP_LAYOUT = """MMVP-VLM (hf download MMVP/MMVP_VLM --repo-type dataset --local-dir DIR) is DIR/Questions.csv with
DIR/MLLM_VLM Images/<type>/<question id>.jpg"""


@dataclass(frozen=True)
class WinogroundExample:
    """Captions and images belong together by position."""

    id: str
    captions: tuple[str, str]
    images: tuple[Callable[[], Image.Image], Callable[[], Image.Image]]


def read_winoground(root: str) -> list[WinogroundExample]:
    """All examples in file order. Raises UserError for a missing file, field or image."""
    folder = next((f for f in (Path(root) / "data", Path(root)) if (f / "examples.jsonl").is_file()), None)
    if folder is None:
        raise UserError(f"there is no examples.jsonl in {root} or {root}/data. {WINOGROUND_LAYOUT}")
    load = _image_source(folder)
    examples = []
    for number, (where, row) in enumerate(json_lines(folder / "examples.jsonl")):
        try:
            captions = (str(row["caption_0"]), str(row["caption_1"]))
            names = (str(row["image_0"]), str(row["image_1"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: needs caption_0, caption_1, image_0, image_1 ({error!r}).") from error
        examples.append(WinogroundExample(str(row.get("id", number)), captions, (load(names[0]), load(names[1]))))
    if not examples:
        raise UserError(f"{folder / 'examples.jsonl'} is empty. {WINOGROUND_LAYOUT}")
    return examples


def _image_source(folder: Path) -> Callable[[str], Callable[[], Image.Image]]:
    """A function from an image's name to a function that opens it; images lie in a folder or its zip file."""
    if (folder / "images").is_dir():
        names: dict[str, Any] = {path.stem: path for path in (folder / "images").iterdir()}
        source = folder / "images"
        read: Callable[[Any], bytes] = Path.read_bytes
    elif (folder / "images.zip").is_file():
        try:
            archive = zipfile.ZipFile(folder / "images.zip")
        except Exception as error:  # as below
            raise UserError(f"{folder / 'images.zip'} is damaged ({error}): fetch it again.") from error
        names = {Path(name).stem: name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name}
        source, read = folder / "images.zip", archive.read
    else:
        raise UserError(f"{folder} holds neither images/ nor images.zip. {WINOGROUND_LAYOUT}")

    def find(name: str) -> Callable[[], Image.Image]:
        stem = Path(name).stem if Path(name).suffix in (".png", ".jpg", ".jpeg") else name
        if stem not in names:
            raise UserError(f"{source} holds no image '{name}' that examples.jsonl names. {WINOGROUND_LAYOUT}")
        return partial(_open_member, read, names[stem], f"{source}: {name}")

    return find


def _open_member(read: Callable[[Any], bytes], member: Any, name: str) -> Image.Image:
    try:
        data = read(member)
    except Exception as error:  # zipfile raises nearly anything on damaged bytes
        raise UserError(f"{name} cannot be read ({error}): fetch the archive again.") from error
    return open_required(data, name)


@dataclass(frozen=True)
class MMVPPair:
    """Two statements, with the ids of their rows, and the two images of those rows."""

    type: str
    ids: tuple[int, int]
    statements: tuple[str, str]
    images: tuple[Path, Path]


def read_mmvp(root: str) -> list[MMVPPair]:
    """Pairs in file order: two rows make one. Raises UserError for a missing file or column, or an odd number of rows."""
    file = Path(root) / "Questions.csv"
    if not file.is_file():
        raise UserError(f"there is no Questions.csv in {root}. {MMVP_LAYOUT}")
    try:
        rows = list(csv.reader(io.StringIO(read_text(file), newline="")))[1:]
    except csv.Error as error:
        raise UserError(f"{file} is no table ({error}).") from error
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows or len(rows) % 2:
        raise UserError(f"{file} has {len(rows)} rows below its header; two make a pair (the release has 270). {MMVP_LAYOUT}")
    entries = []
    for number, row in enumerate(rows, 2):
        if len(row) < 3 or not row[0].strip().isdigit():
            raise UserError(f"{file}, line {number}: needs question id, type, statement; it has {row[:3]}.")
        try:
            path = inside(Path(root) / "MLLM_VLM Images", row[1].strip(), f"{int(row[0])}.jpg")
        except BadSample as error:
            raise UserError(f"{file}, line {number}: {error}.") from None
        if not path.is_file():
            raise UserError(f"{file}, line {number}: there is no image {path}. {MMVP_LAYOUT}")
        entries.append((int(row[0]), row[1].strip(), row[2].strip(), path))
    return [MMVPPair(a[1], (a[0], b[0]), (a[2], b[2]), (a[3], b[3])) for a, b in zip(entries[::2], entries[1::2], strict=True)]


@dataclass(frozen=True)
class SegmentationLayout:
    """Where a data set keeps the images and label maps of its evaluation split, and how labels are counted.

    ``zero_is_nothing``: label 0 is no class and the others count from 1, as in ADE20K and VOC20.
    """

    images: str
    labels: str
    label_suffix: str
    zero_is_nothing: bool


SEGMENTATION_LAYOUTS = {
    "ade20k": SegmentationLayout("images/validation", "annotations/validation", ".png", True),
    "coco_stuff": SegmentationLayout("images/val2017", "annotations/val2017", "_labelTrainIds.png", False),
    "voc20": SegmentationLayout("JPEGImages", "SegmentationClass", ".png", True),
}


def segmentation_files(root: str, layout: SegmentationLayout) -> list[tuple[Path, Path]]:
    """Pairs (image, label map), sorted by name; Pascal VOC's in the order of its list. Raises UserError for what is missing."""
    if layout == SEGMENTATION_LAYOUTS["voc20"]:
        return VocSegmentation(root).files
    base = Path(root)
    expected = f"{base / layout.images}/*.jpg with {base / layout.labels}/*{layout.label_suffix}"
    names = sorted(path.stem for path in (base / layout.images).glob("*.jpg"))
    if not names:
        raise UserError(f"no images in {base / layout.images}. The official layout is: {expected}")
    pairs = [(base / layout.images / f"{n}.jpg", base / layout.labels / f"{n}{layout.label_suffix}") for n in names]
    for _, path in pairs:
        if not path.is_file():
            raise UserError(f"{path} is missing. The official layout is: {expected}")
    return pairs


def read_label_map(path: Path, layout: SegmentationLayout) -> np.ndarray:
    """(H, W) int64 classes, 255 where nothing counts."""
    if layout == SEGMENTATION_LAYOUTS["voc20"]:
        labels = class_numbers(path).astype(np.int64)
    else:
        labels = np.asarray(open_required(path, kind="a map of class numbers", opener=open_image)).astype(np.int64)
    if labels.ndim != 2:
        raise UserError(f"{path} is not a map of class numbers: it has {labels.shape[-1]} channels.")
    if layout.zero_is_nothing:
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    return labels


def read_class_names(path: str) -> tuple[list[str], list[int]]:
    """A file of one class per line, synonyms separated by commas, to all names and the class of each."""
    names = [(name.strip(), number) for number, line in enumerate(read_names(path)) for name in line.split(",") if name.strip()]
    if not names:
        raise UserError(f"{path} names no class; it needs one per line, synonyms separated by commas.")
    return [name for name, _ in names], [number for _, number in names]


def each_image(sources: Sequence[Path | Callable[[], Image.Image]]) -> Iterator[Image.Image]:
    """One open image at a time."""
    for source in sources:
        yield open_required(source) if isinstance(source, Path) else source()
