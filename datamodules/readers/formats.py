"""The annotation formats: each function reads one into :class:`AnnotatedImages`, and a YAML names it.

Paths in annotations are relative to ``images``, or absolute and inside it.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import os
import string
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.annotations import AnnotatedImages, Record
from datamodules.readers.base import BadSample
from datamodules.readers.tar_index import IMAGE_SUFFIXES, label_number
from datamodules.readers.text import json_lines, read_json, read_names
from models.batch import Skipped
from models.errors import UserError


def coco_captions(annotations: str, images: str, index_dir: str | None = None) -> AnnotatedImages:
    """COCO's captions JSON (``captions_train2017.json``): ``images`` with id and file_name, ``annotations`` with image_id
    and caption. An image's captions keep the order of the file; images without one are skipped.
    """

    def records() -> Iterator[Record | Skipped]:
        content = _json_of(annotations, ("images", "annotations"))
        captions: dict[Any, list[str]] = {}
        for number, entry in enumerate(content["annotations"]):
            where = f"{annotations}, annotation {number}"
            try:
                image, caption = _fields(entry, "image_id", "caption")
                captions.setdefault(_id_of(image), []).append(caption)
            except BadSample as error:
                yield Skipped(-1, where, str(error))
        seen = set()
        for number, entry in enumerate(content["images"]):
            where = f"{annotations}, image {number}"
            try:
                image, path = _fields(entry, "id", "file_name")
                image = _id_of(image)
            except BadSample as error:
                yield Skipped(-1, where, str(error))
                continue
            if image in seen:
                yield Skipped(-1, str(path), f"duplicate key: image id {image} again ({where}), the first is used")
                continue
            seen.add(image)
            yield Record(path, captions.pop(image, []), where=where)
        for image in captions:
            yield Skipped(-1, f"image id {image}", f"no image: a caption names it, {annotations} lists none")

    return AnnotatedImages(images, [annotations], records, ["coco"], index_dir=index_dir)


def karpathy(
    annotations: str, images: str, splits: Sequence[str] = ("train",), index_dir: str | None = None
) -> AnnotatedImages:
    """Karpathy's JSON (``dataset_coco.json``, ``dataset_flickr30k.json``): ``images`` with filename, optional filepath,
    split and sentences.

    Args:
        splits: which of train, restval, val, test; COCO is usually trained on train and restval.
    """

    def records() -> Iterator[Record | Skipped]:
        present = set()
        for number, entry in enumerate(_json_of(annotations, ("images",))["images"]):
            where = f"{annotations}, image {number}"
            try:
                name, split, sentences = _fields(entry, "filename", "split", "sentences")
                present.add(str(split))
                if split in splits:
                    captions = [_fields(sentence, "raw")[0] for sentence in _list_of(sentences)]
                    folder = entry.get("filepath")
                    yield Record(f"{folder}/{name}" if folder else name, captions, where=where)
            except BadSample as error:
                yield Skipped(-1, where, str(error))
        if absent := set(splits) - present:
            raise UserError(f"{annotations} has no split {', '.join(sorted(absent))}; it has {', '.join(sorted(present))}.")

    return AnnotatedImages(images, [annotations], records, ["karpathy", list(splits)], index_dir=index_dir)


def table(
    annotations: str | Sequence[str],
    images: str,
    path: str,
    captions: str | Sequence[str],
    delimiter: str = ",",
    columns: Sequence[str] | None = None,
    quoted: bool = True,
    label: str | None = None,
    class_names: Sequence[str] | None = None,
    missing_is_normal: bool = False,
    index_dir: str | None = None,
) -> AnnotatedImages:
    """CSV or TSV files with a row per image, or per image and caption. Rows of the same path are one sample.

    Args:
        annotations: one file, or several of the same columns.
        path: column of the image's path; or a pattern in braces such as ``{folder}/{row}_{crc32}.jpg`` of column names,
            ``row`` (number of the row in its file, from 0) and ``crc32`` (of the column ``url``).
        captions: column or columns of captions, in the order the sample's captions shall have.
        columns: names of the columns where the file has no header.
        quoted: whether fields may stand in quotes; CC3M's and CC12M's must not be read so.
        label: column with the index of the class, or with one of ``class_names``.
        missing_is_normal: see :class:`AnnotatedImages`.
    """
    files = [annotations] if isinstance(annotations, str) else list(annotations)
    caption_names = [captions] if isinstance(captions, str) else list(captions)

    def records() -> Iterator[Record | Skipped]:
        csv.field_size_limit(sys.maxsize)
        for file in files:
            with open(file, newline="", encoding="utf-8-sig", errors="replace") as lines:
                # A null byte, left by a broken write, would end the reading on some versions of Python.
                clean = (line.replace("\0", "") for line in lines)
                quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
                rows = csv.reader(clean, delimiter=delimiter, quoting=quoting)
                header = list(columns) if columns else next(rows, [])
                make = _row_reader(file, header, path, caption_names, label, class_names)
                try:
                    for number, row in enumerate(rows):
                        where = f"{file}, line {rows.line_num}"
                        if row and len(row) != len(header):
                            yield Skipped(-1, where, f"bad row: {len(row)} fields instead of {len(header)}")
                        elif row:
                            yield make(row, number, where)
                except csv.Error as error:
                    raise UserError(f"{file}, line {rows.line_num}: {error}.") from error

    settings = ["table", path, caption_names, delimiter, columns and list(columns), quoted, label]
    names = list(class_names) if class_names else None
    return AnnotatedImages(images, files, records, settings, names, missing_is_normal, index_dir)


def parquet(
    annotations: str | Sequence[str],
    images: str,
    path: str,
    captions: str | Sequence[str],
    label: str | None = None,
    class_names: Sequence[str] | None = None,
    missing_is_normal: bool = False,
    index_dir: str | None = None,
) -> AnnotatedImages:
    """Parquet files, as :func:`table`; a caption column may also hold lists. Read through pyarrow, piece by piece."""
    files = [annotations] if isinstance(annotations, str) else list(annotations)
    caption_names = [captions] if isinstance(captions, str) else list(captions)

    def records() -> Iterator[Record | Skipped]:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError("parquet files are read with pyarrow, which is not installed: pip install pyarrow") from error
        for file in files:
            try:
                source = pyarrow.parquet.ParquetFile(file)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file} is no parquet file, or a damaged one ({error}).") from error
            header = source.schema_arrow.names
            make = _row_reader(file, header, path, caption_names, label, class_names)
            used = [name for name in header if name in _names_in(path) | {*caption_names, label, "url"}]
            number = 0
            try:
                for batch in source.iter_batches(columns=used, batch_size=16_384):
                    values = {name: batch.column(name).to_pylist() for name in used}
                    for i in range(batch.num_rows):
                        row = [values[name][i] if name in values else None for name in header]
                        yield make(row, number, f"{file}, row {number}")
                        number += 1
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file} is damaged behind row {number} ({error}): fetch it again.") from error

    settings = ["parquet", path, caption_names, label]
    names = list(class_names) if class_names else None
    return AnnotatedImages(images, files, records, settings, names, missing_is_normal, index_dir)


def json_list(
    annotations: str | Sequence[str],
    images: str,
    path: str = "image",
    captions: str | Sequence[str] = ("caption",),
    index_dir: str | None = None,
) -> AnnotatedImages:
    """A JSON list, or JSON lines, of objects with ``path`` and caption fields (a string or a list), as LAVIS, freeze-align
    and LLaVA write them; without the fields, the value of LLaVA's last ``conversations`` entry is the caption.
    """
    files = [annotations] if isinstance(annotations, str) else list(annotations)
    caption_names = [captions] if isinstance(captions, str) else list(captions)

    def records() -> Iterator[Record | Skipped]:
        for file in files:
            for number, entry in enumerate(_json_entries(file)):
                where = f"{file}, entry {number}"
                try:
                    (image,) = _fields(entry, path)
                    texts = _flat([entry[name] for name in caption_names if entry.get(name)])
                    if not texts and entry.get("conversations"):
                        (said,) = _fields(_list_of(entry["conversations"])[-1], "value")
                        texts = [said.replace("<image>", "")] if isinstance(said, str) else []
                    yield Record(image, texts, where=where)
                except BadSample as error:
                    yield Skipped(-1, where, str(error))

    return AnnotatedImages(images, files, records, ["json", path, caption_names], index_dir=index_dir)


def class_folders(root: str, caption: str = "a photo of a {}", index_dir: str | None = None) -> AnnotatedImages:
    """A folder of images for each class, as torchvision's ImageFolder reads them: labels follow the sorted folder names. Where
    all of them are numbers, as in ImageNet-V2, they are sorted as numbers.

    ``classes.txt`` beside or above the folders may give the names of the classes, one line per folder in sorted order, further
    names of it after commas; without it a name is the folder's, with spaces for underscores.

    Args:
        caption: of every image, ``{}`` is the class name; what the recipe trains on, not what the suites ask with.
    """
    place = Path(root)
    if not place.is_dir():
        raise UserError(f"there is no folder {root} with a folder of images for each class.")
    folders = sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX")))
    if all(folder.isdecimal() for folder in folders):
        folders.sort(key=int)
    if not folders:
        raise UserError(f"{root} holds no folders; wanted: one folder of images for each class.")
    names = _class_names(place, folders)
    suffixes = {f".{suffix}" for suffix in (*IMAGE_SUFFIXES, "bmp", "tif", "tiff", "gif", "ppm")}

    def records() -> Iterator[Record]:
        for label, folder in enumerate(folders):
            for file in sorted(file for part in _folders_below(place / folder) for file in part.iterdir() if file.is_file()):
                if file.suffix.lower() in suffixes and not file.name.startswith("."):
                    path = file.relative_to(place).as_posix()
                    yield Record(path, [caption.format(names[label])], label, str(file))

    settings: list[Any] = ["folders", caption, folders]
    settings.append(
        [[path.as_posix(), path.stat().st_mtime_ns] for folder in folders for path in _folders_below(place / folder)]
    )
    return AnnotatedImages(root, [], records, settings, names, index_dir=index_dir)


# ------------------------------------------------------------------------------------------------------------- helpers


def _row_reader(
    file: str, header: list[str], path: str, captions: list[str], label: str | None, class_names: Sequence[str] | None
) -> Callable[[Sequence[Any], int, str], Record | Skipped]:
    """``(row, its number, where) -> Record``. Raises UserError for a column that the file lacks."""
    positions = {name: i for i, name in enumerate(header)}  # of equal names the last, as SAIL's files have 'Image Path'
    pattern = "{" in path
    column_names = [*_names_in(path), *captions, *([label] if label else [])]
    needed = [name for name in column_names if not (pattern and name in ("row", "crc32"))]
    if pattern and "crc32" in _names_in(path):
        needed.append("url")
    if absent := [name for name in needed if name not in positions]:
        raise UserError(f"{file} has no column {', '.join(map(repr, absent))}; its columns are {', '.join(header)}.")
    fields = [positions[name] for name in captions]
    place = positions.get(path)

    def make(row: Sequence[Any], number: int, where: str) -> Record | Skipped:
        if pattern:
            values = {name: row[i] for name, i in positions.items()} | {"row": number}
            if "url" in needed:
                values["crc32"] = zlib.crc32(str(values["url"]).encode("utf-8", "replace"))
            image = path.format_map(values)
        else:
            image = row[place]
        if not image:
            return Skipped(-1, where, "no image: the path is empty")
        try:
            value = None if label is None else row[positions[label]]
            index = -1 if value is None or value == "" else label_number(value, class_names)
        except ValueError as error:
            return Skipped(-1, str(image), f"{error} ({where})")
        return Record(str(image), _flat([row[i] for i in fields]), index, where)

    return make


def _names_in(path: str) -> set[str]:
    """Columns that ``path`` speaks of: itself, or those in braces."""
    if "{" not in path:
        return {path}
    return {name for _, name, _, _ in string.Formatter().parse(path) if name}


def _flat(values: Sequence[Any]) -> list[str]:
    lists = (value if isinstance(value, (list, tuple)) else [value] for value in values)
    return [value for value in itertools.chain.from_iterable(lists) if isinstance(value, str)]


def _json_of(file: str, keys: tuple[str, ...]) -> dict[str, Any]:
    content = read_json(file)
    absent = [key for key in keys if not isinstance(content, Mapping) or not isinstance(content.get(key), list)]
    if absent:
        present = ", ".join(content) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{file} is of another format: it has no list {' or '.join(map(repr, absent))} (found: {present}).")
    return content


def _json_entries(file: str) -> Iterator[Any]:
    with open(file, "rb") as stream:
        head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        yield from read_json(file)
    else:
        yield from (entry for _, entry in json_lines(file))


def _fields(entry: Any, *names: str) -> list[Any]:
    """Values of an object. Raises BadSample."""
    if not isinstance(entry, Mapping) or any(name not in entry for name in names):
        present = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise BadSample(f"bad entry: it lacks {', '.join(map(repr, names))} (found: {present[:80]})")
    return [entry[name] for name in names]


def _id_of(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise BadSample(f"bad entry: the id {str(value)[:80]} is neither a number nor text")
    return value


def _list_of(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadSample(f"bad entry: {type(value).__name__} instead of a list")
    return value


def _class_names(place: Path, folders: list[str]) -> list[str]:
    for file in (place / "classes.txt", place.parent / "classes.txt"):
        if file.is_file():
            lines = read_names(file)
            if len(lines) != len(folders):
                raise UserError(f"{file} names {len(lines)} classes, {place} holds {len(folders)} folders.")
            return [line.split(",")[0].strip() for line in lines]
    return [folder.replace("_", " ") for folder in folders]


def _folders_below(place: Path) -> list[Path]:
    """``place`` and the folders in it, through links (as torchvision's ImageFolder), each once."""
    folders, visited = [], set()
    for folder, names, _ in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            names.clear()  # a link to a folder above it
            continue
        visited.add(real)
        folders.append(Path(folder))
    return sorted(folders)
