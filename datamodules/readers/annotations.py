"""Images in files beside an annotation file that names them: one dataset for every such format, and its index.

A format is a function that reads :class:`Record` after :class:`Record` (see :mod:`datamodules.readers.formats`). They are
read once; paths and captions then lie in a memory-mapped index in a cache folder, so that millions of long captions need
no RAM and a second start needs no reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from datamodules.readers import images as image_reader
from datamodules.readers.base import BadSample, inside
from datamodules.readers.images import open_rgb
from datamodules.readers.tar_index import key_hash
from datamodules.readers.text import clean_text
from models.batch import Skipped
from models.errors import UserError
from models.io import atomic_write, stable_hash

VERSION = 2  # of the cached index; raise it when its fields or their meaning change
CAPTION = np.dtype([("start", "<i8"), ("size", "<i4")])
SAMPLE = np.dtype([("start", "<i8"), ("size", "<i4"), ("hash", "<u8"), ("first", "<i8"), ("captions", "<i4"), ("label", "<i4")])


class Record(NamedTuple):
    """One entry of an annotation file. ``path`` is relative to the folder of images; entries of one path are one sample."""

    path: str
    captions: Sequence[str]
    label: int = -1
    where: str = ""  # of the entry, for messages: "captions.csv, line 7"


class AnnotatedImages:
    """Image-text dataset over the images that annotation files name, in the order of their first mention, see
    :class:`~datamodules.readers.base.ImageTextDataset`.

    Entries without a caption or whose image is missing stand in ``skipped``; an image that cannot be decoded is found
    when it is read. The index is made anew when an annotation file changes, or any image: its name, size or time of change.

    Args:
        images: folder that the paths are relative to.
        annotations: the files that ``records`` reads.
        records: reads them; called only where there is no index yet.
        settings: JSON-able, what else decides on the records.
        class_names: of the labels.
        missing_is_normal: entries without a file become one line in ``skipped`` together: web corpora are never whole.
        index_dir: where indices are kept; None: ``$XDG_CACHE_HOME/annotation_index`` (``~/.cache/annotation_index``).

    Raises:
        UserError: a file or folder is missing, an entry points outside ``images``, or no usable sample is left.
    """

    pre_encoded = False

    def __init__(
        self,
        images: str | Path,
        annotations: Sequence[str | Path],
        records: Callable[[], Iterator[Record | Skipped]],
        settings: Any = None,
        class_names: list[str] | None = None,
        missing_is_normal: bool = False,
        index_dir: str | None = None,
    ):
        self.folder, self.class_names = Path(images), class_names
        files = [Path(file) for file in annotations]
        for file in files:
            if not file.is_file():
                raise UserError(f"there is no annotation file {file}.")
        if not self.folder.is_dir():
            raise UserError(f"there is no folder of images {self.folder}.")
        cache = Path(index_dir) if index_dir else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "annotation_index")
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        name = stable_hash([str(self.folder.resolve()), stats, settings, class_names, missing_is_normal])
        self._place = cache.expanduser() / name
        facts = _facts(self._place, self.folder) or _make(self._place, self.folder, records, missing_is_normal)
        self._samples, self._captions, self._text = _arrays(self._place)
        self.skipped = [Skipped(*entry) for entry in facts["skipped"]]
        self.fingerprint = stable_hash([image_reader.VERSION, facts["digest"], class_names])
        self._rows: np.ndarray = np.arange(len(self._samples))
        if not len(self):
            named = ", ".join(map(str, files)) or "the folder"
            reasons = "".join(f"\n  {entry.key}: {entry.reason}" for entry in self.skipped[:5])
            raise UserError(f"no usable sample of {named}: images are looked for in {self.folder}.{reasons}")

    def part(self, low: float, high: float) -> AnnotatedImages:
        """The samples [low, high) in the order of the hashes of their paths, as shares of all: how one set is split."""
        order = np.argsort(self._samples["hash"][self._rows], kind="stable")
        first, last = (math.ceil(round(share * len(order), 6)) for share in (low, high))
        if first >= last:
            raise UserError(
                f"the share {low:g} to {high:g} of the {len(order)} samples in {self.folder} is empty. A split drawn from "
                "few samples needs a larger val_fraction or test_fraction, or 0 to do without."
            )
        chosen = object.__new__(AnnotatedImages)
        chosen.__dict__.update(self.__dict__)
        chosen._rows = self._rows[np.sort(order[first:last])]
        chosen.fingerprint = stable_hash([self.fingerprint, low, high])
        # What has no row belongs to no part: the first one reports it.
        chosen.skipped = self.skipped if high == 1.0 else []
        return chosen

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        """Path of the image, below the folder of images."""
        sample = self._sample(i)
        return self._read(sample["start"], sample["size"])

    @property
    def caption_counts(self) -> np.ndarray:
        """(N,) int64: how many captions each sample has; at least 1."""
        return self._samples["captions"][self._rows].astype(np.int64)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices, -1 where a sample has none."""
        return self._samples["label"][self._rows].astype(np.int64)

    def captions(self, i: int) -> list[str]:
        """The sample's captions, at least one, in the order of the annotations."""
        sample = self._sample(i)
        places = self._captions[sample["first"] : sample["first"] + sample["captions"]]
        return [self._read(start, size) for start, size in places.tolist()]

    def image(self, i: int) -> Image.Image:
        """The sample's image in RGB. Raises BadSample."""
        return open_rgb(self.folder / self.key(i))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_samples": None, "_captions": None, "_text": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)  # a worker maps the index itself
        self._samples, self._captions, self._text = _arrays(self._place)

    def _sample(self, i: int) -> np.void:
        return self._samples[self._rows[i]]

    def _read(self, start: int, size: int) -> str:
        return self._text[start : start + size].tobytes().decode("utf-8", "surrogateescape")


def _make(place: Path, folder: Path, records: Callable[[], Iterator[Record | Skipped]], missing_is_normal: bool) -> dict:
    """Write the index of ``records`` to ``place``; its facts. Raises WriteError where it cannot be written."""
    with atomic_write(place.with_suffix(".text")) as temporary, temporary.open("wb") as text:
        samples, captions, facts = _build(records(), folder, missing_is_normal, text)
    for name, values in (("samples", samples), ("captions", captions)):
        with atomic_write(place.with_suffix(f".{name}.npy")) as temporary, temporary.open("wb") as file:
            np.save(file, values)
    with atomic_write(place.with_suffix(".json")) as temporary:  # last: without it the rest counts for nothing
        temporary.write_text(json.dumps(facts))
    return facts


def _arrays(place: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SAMPLE (N,), CAPTION (M,), and the bytes of the paths and captions that they point to."""
    files = [place.with_suffix(suffix) for suffix in (".samples.npy", ".captions.npy", ".text")]
    samples, captions = (np.load(file, mmap_mode="r") for file in files[:2])
    return samples, captions, np.memmap(files[2], np.uint8, "r") if len(samples) else np.empty(0, np.uint8)


def _build(records: Iterator[Record | Skipped], folder: Path, missing_is_normal: bool, output: BinaryIO) -> tuple:
    """One pass over the records, which writes paths and captions to ``output``: samples, captions, and facts for JSON."""
    listings = _Listings(folder)
    digest, skipped, position = hashlib.sha256(), [], 0
    paths, captions, owners, labels, hashes = array("q"), array("q"), array("q"), array("q"), array("Q")
    missing = total = 0
    for record in records:
        total += 1
        if isinstance(record, Skipped):
            skipped.append(record)
            continue
        try:
            path = _relative(folder, record)
        except BadSample as error:
            skipped.append(Skipped(-1, record.where or str(record.path)[:80], str(error)))
            continue
        texts = [clean_text(caption).strip() for caption in record.captions if isinstance(caption, str)]
        texts = [text for text in dict.fromkeys(texts) if text]
        file = listings.file(path)
        if not texts or file is None:
            missing += file is None
            if file is not None or not missing_is_normal:
                reason = "no caption: the entry has none" if file is not None else f"missing image: not in {folder}"
                skipped.append(Skipped(-1, path, f"{reason} ({record.where})"))
            continue
        encoded = path.encode("utf-8", "surrogateescape")
        digest.update(b"\0%s\0%d\0%d\0%d\0" % (encoded, *file, record.label))
        for text in texts:
            data = text.encode()
            digest.update(data + b"\0")
            captions.extend((position, len(data)))
            owners.append(len(labels))
            position += output.write(data)
        paths.extend((position, len(encoded)))
        position += output.write(encoded)
        labels.append(record.label)
        hashes.append(key_hash(path))
    if missing_is_normal and missing:
        reason = f"missing images: {missing} of {total} entries have no file in {folder}, which is left as it is"
        skipped.append(Skipped(-1, folder.name, reason))
    arrays = (np.frombuffer(values, values.typecode) for values in (paths, captions, owners, labels, hashes))
    facts = {"version": VERSION, "skipped": skipped, "digest": digest.hexdigest(), "folders": listings.folders}
    return *_join(*arrays), facts


def _join(paths: np.ndarray, captions: np.ndarray, owners: np.ndarray, labels: np.ndarray, hashes: np.ndarray) -> tuple:
    """Samples and captions of entries, where entries with equal hashes of their paths are one sample."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # of the groups by first mention
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    owners = rank[group.reshape(-1)][owners] if len(owners) else owners
    by_sample = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=len(order))
    samples = np.zeros(len(order), SAMPLE)
    first = first[order]
    samples["start"], samples["size"] = paths.reshape(-1, 2)[first].T if len(first) else ([], [])
    samples["hash"], samples["label"], samples["captions"] = hashes[first], labels[first], counts
    samples["first"] = np.cumsum(counts) - counts
    texts = np.zeros(len(owners), CAPTION)
    texts["start"], texts["size"] = captions.reshape(-1, 2)[by_sample].T if len(owners) else ([], [])
    return samples, texts


class _Listings:
    """Which files there are, by listing each folder once: asking for millions of files one by one takes minutes.

    ``folders``: every folder that was asked for, and what :func:`_state` says of it.
    """

    def __init__(self, root: Path):
        self.root = root
        self.folders: dict[str, Any] = {}
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # sorted hashes of names; sizes and times

    def file(self, path: str) -> tuple[int, int] | None:
        """Bytes and time of change in ns of the file; None if there is none."""
        folder, _, name = path.rpartition("/")
        if folder not in self._known:
            entries = list(_files(self.root / folder))
            self.folders[folder] = _state(entries)
            table: np.ndarray = np.array([(hash(name), size, time) for name, size, time in entries], np.int64).reshape(-1, 3)
            table = table[np.argsort(table[:, 0])]
            self._known[folder] = table[:, 0].copy(), table[:, 1:]
        hashes, files = self._known[folder]
        place = int(np.searchsorted(hashes, hash(name)))
        return tuple(files[place].tolist()) if place < len(hashes) and hashes[place] == hash(name) else None


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and time of change of every file of a folder; nothing if there is no such folder."""
    with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # a dangling link
                if entry.is_file():
                    stat = entry.stat()
                    yield entry.name, stat.st_size, stat.st_mtime_ns


def _state(files: Iterable[tuple[str, int, int]]) -> int:
    """A number that changes when a file of a folder comes, goes or changes; their order does not matter."""
    total = 0
    for file in files:
        total ^= int.from_bytes(hashlib.blake2b(repr(file).encode("utf-8", "replace"), digest_size=8).digest(), "little")
    return total


def _relative(folder: Path, record: Record) -> str:
    """The normalised path below the folder of images.

    Raises BadSample for what is no path, and UserError where it leads out of the folder.
    """
    path = record.path
    if not isinstance(path, str) or not path.strip():
        raise BadSample(f"bad path: {str(path)[:80]!r} ({record.where})")
    if os.path.isabs(path):
        path = os.path.relpath(path, folder.absolute())
    path = os.path.normpath(path)
    if path == "." or path.split(os.sep)[0] == "..":
        raise UserError(
            f"{record.where or 'the annotations'}: the image {record.path!r} is not inside {folder}. Give the folder that the "
            "paths are relative to, or correct the annotations; nothing was read from there."
        )
    inside(folder, path)
    return path


def _facts(place: Path, folder: Path) -> dict | None:
    """Of the index, if it is there and no folder of images has changed since."""
    try:
        facts = json.loads(place.with_suffix(".json").read_text())
        if facts["version"] != VERSION:
            return None
        return facts if all(_state(_files(folder / name)) == state for name, state in facts["folders"].items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
