"""Images in files beside an annotation file that names them: one dataset for every such format, and its index.

A format is a function that reads :class:`Record` after :class:`Record` (see :mod:`datamodules.readers.formats`). They are
read once; paths and captions then lie in a memory-mapped index in a cache folder, so that millions of long captions need
no RAM and a second start needs no reading.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from datamodules.readers.images import decode, decode_or_skipped
from datamodules.readers.tar_index import key_hash
from models.batch import CAPTIONS, IMAGE, INDEX, KEY, LABEL, Skipped
from models.errors import UserError
from models.io import atomic_write, stable_hash

VERSION = 1  # of the cached index; raise it when its fields or their meaning change
CAPTION = np.dtype([("start", "<i8"), ("size", "<i4")])
SAMPLE = np.dtype([("start", "<i8"), ("size", "<i4"), ("hash", "<u8"), ("first", "<i8"), ("captions", "<i4"), ("label", "<i4")])


class Record(NamedTuple):
    """One entry of an annotation file. ``path`` is relative to the folder of images; entries of one path are one sample."""

    path: str
    captions: Sequence[str]
    label: int = -1
    where: str = ""  # of the entry, for messages: "captions.csv, line 7"


class AnnotatedImages(Dataset):
    """Map-style dataset over the images that annotation files name, in the order of their first mention.

    Entries without a caption or whose image is missing stand in ``skipped``; an image that cannot be decoded is found
    when it is read, and ``dataset[i]`` is then a :class:`Skipped`. The index is made anew when an annotation file or a
    folder with images changes; an image that is overwritten in place with one of another size is noticed then, too.

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
        self.fingerprint = stable_hash([facts["digest"], class_names])
        self._rows = np.arange(len(self._samples))
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

    def label(self, i: int) -> int | None:
        label = int(self._sample(i)["label"])
        return label if label >= 0 else None

    def captions(self, i: int) -> list[str]:
        """The sample's captions, at least one, in the order of the annotations."""
        sample = self._sample(i)
        found = self._captions[sample["first"] : sample["first"] + sample["captions"]]
        return [self._read(start, size) for start, size in found.tolist()]

    def image(self, i: int) -> Image.Image:
        """The sample's image, decoded to RGB. Raises whatever the file system or the decoder raises."""
        return decode((self.folder / self.key(i)).read_bytes())

    def image_or_skipped(self, i: int) -> Image.Image | Skipped:
        """:meth:`image`, with a failing decoder or a vanished file turned into a :class:`Skipped`."""
        key = self.key(i)
        try:
            data = (self.folder / key).read_bytes()
        except FileNotFoundError:
            return Skipped(i, key, "missing image: the file has vanished since the start")
        return decode_or_skipped(data, i, key)

    def __getitem__(self, i: int) -> dict | Skipped:
        image = self.image_or_skipped(i)
        if isinstance(image, Skipped):
            return image
        return {INDEX: i, KEY: self.key(i), IMAGE: image, CAPTIONS: self.captions(i), LABEL: self.label(i)}

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
    """Write the index of ``records`` to ``place``; its facts. Raises UserError where it cannot be written."""
    try:
        with atomic_write(place.with_suffix(".text")) as temporary, temporary.open("wb") as text:
            samples, captions, facts = _build(records(), folder, missing_is_normal, text)
        for name, values in (("samples", samples), ("captions", captions)):
            with atomic_write(place.with_suffix(f".{name}.npy")) as temporary, temporary.open("wb") as file:
                np.save(file, values)
        with atomic_write(place.with_suffix(".json")) as temporary:  # last: without it the rest counts for nothing
            temporary.write_text(json.dumps(facts))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"the index of the annotations cannot be written to {place.parent} ({error.strerror}): free space there, or set "
            "index_dir of the reader to another folder."
        ) from error
    return facts


def _arrays(place: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SAMPLE (N,), CAPTION (M,), and the bytes of the paths and captions that they point to."""
    files = [place.with_suffix(suffix) for suffix in (".samples.npy", ".captions.npy", ".text")]
    samples, captions = (np.load(file, mmap_mode="r") for file in files[:2])
    return samples, captions, np.memmap(files[2], np.uint8, "r") if len(samples) else np.empty(0, np.uint8)


def _build(records: Iterator[Record | Skipped], folder: Path, missing_is_normal: bool, text: BinaryIO) -> tuple:
    """One pass over the records, which writes paths and captions to ``text``: samples, captions, and facts for JSON."""
    listings = _Listings(folder)
    digest, skipped, position = hashlib.sha256(), [], 0
    paths, captions, owners, labels, hashes = array("q"), array("q"), array("q"), array("q"), array("Q")
    missing = total = 0
    for record in records:
        total += 1
        if isinstance(record, Skipped):
            skipped.append(record)
            continue
        path = _inside(folder, record)
        found = [caption.strip() for caption in record.captions if caption and caption.strip()]
        size = listings.size_of(path)
        if not found or size is None:
            missing += size is None
            if size is not None or not missing_is_normal:
                reason = "no caption: the entry has none" if size is not None else f"missing image: not in {folder}"
                skipped.append(Skipped(-1, path, f"{reason} ({record.where})"))
            continue
        encoded = path.encode("utf-8", "surrogateescape")
        digest.update(b"\0%s\0%d\0%d\0" % (encoded, size, record.label))
        for caption in dict.fromkeys(found):
            data = caption.encode("utf-8", "surrogateescape")
            digest.update(data + b"\0")
            captions.extend((position, len(data)))
            owners.append(len(labels))
            position += text.write(data)
        paths.extend((position, len(encoded)))
        position += text.write(encoded)
        labels.append(record.label)
        hashes.append(key_hash(path))
    if missing_is_normal and missing:
        reason = f"missing images: {missing} of {total} entries have no file in {folder}, which is left as it is"
        skipped.append(Skipped(-1, folder.name, reason))
    arrays = (np.frombuffer(values, values.typecode) for values in (paths, captions, owners, labels, hashes))
    facts = {"version": VERSION, "skipped": skipped, "digest": digest.hexdigest(), "folders": listings.folders}
    return *_join(*arrays), facts


def _join(paths: np.ndarray, captions: np.ndarray, owners: np.ndarray, labels: np.ndarray, hashes: np.ndarray):
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
    kept = np.zeros(len(owners), CAPTION)
    kept["start"], kept["size"] = captions.reshape(-1, 2)[by_sample].T if len(owners) else ([], [])
    return samples, kept


class _Listings:
    """Which files there are, by listing each folder once: asking for millions of files one by one takes minutes.

    ``folders``: every folder that was asked for, and its time of change in ns (0: there is none).
    """

    def __init__(self, root: Path):
        self.root, self.folders = root, {}
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # sorted hashes of names, sizes: 16 bytes a file

    def size_of(self, path: str) -> int | None:
        """Bytes of the file; None if there is none."""
        folder, _, name = path.rpartition("/")
        if folder not in self._known:
            self.folders[folder] = _changed(self.root / folder)
            self._known[folder] = self._list(self.root / folder)
        hashes, sizes = self._known[folder]
        place = int(np.searchsorted(hashes, hash(name)))
        return int(sizes[place]) if place < len(hashes) and hashes[place] == hash(name) else None

    @staticmethod
    def _list(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        if not folder.is_dir():
            return np.empty(0, np.int64), np.empty(0, np.int64)
        with os.scandir(folder) as entries:
            found = [(hash(entry.name), entry.stat().st_size) for entry in entries if entry.is_file()]
        hashes, sizes = np.array(found, np.int64).reshape(-1, 2).T
        order = np.argsort(hashes)
        return hashes[order], sizes[order]


def _changed(folder: Path) -> int:
    return folder.stat().st_mtime_ns if folder.is_dir() else 0


def _inside(folder: Path, record: Record) -> str:
    """The normalised path below the folder of images. Raises UserError where it leads out of it."""
    path = record.path
    if os.path.isabs(path):
        path = os.path.relpath(path, folder.absolute())
    path = os.path.normpath(path)
    if path == "." or path.split(os.sep)[0] == "..":
        raise UserError(
            f"{record.where or 'the annotations'}: the image {record.path!r} is not inside {folder}. Give the folder that the "
            "paths are relative to, or mend the annotations; nothing was read from there."
        )
    return path


def _facts(place: Path, folder: Path) -> dict | None:
    """Of the index, if it is there and no folder of images has changed since."""
    try:
        facts = json.loads(place.with_suffix(".json").read_text())
        changed = any(_changed(folder / name) != time for name, time in facts["folders"].items())
        return None if changed or facts["version"] != VERSION else facts
    except (OSError, ValueError, KeyError):
        return None
