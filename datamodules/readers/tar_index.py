"""The index of one tar shard: where every sample's files lie, so that they can be read in any order without unpacking.

A shard holds the files of a sample under one name: ``KEY.jpg`` (or jpeg, png, webp), ``KEY.txt``, ``KEY.json``, the
layout that img2dataset and webdataset write. Building an index reads every header and every text once; it is kept in
a cache folder and rebuilt when the shard's size or time of change differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.batch import Skipped
from models.io import atomic_write, stable_hash

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
ROLES = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), "txt": "text", "json": "json"}
BLOCK = 512  # bytes; tar headers and padding come in such blocks
VERSION = 1  # of the cached index; raise it when the fields below or their meaning change


class ShardIndex(NamedTuple):
    """What is known of one shard.

    ``samples``: structured array, one entry per usable sample: key, hash (64 bits of the key's digest), and position
    and size in bytes of image, text and json (size 0: absent), number of captions, label (-1: none).
    ``skipped``: what was dropped while indexing. ``digest``: of every header and text, thus of what the shard holds.
    """

    samples: np.ndarray
    skipped: list[Skipped]
    digest: str


class Truncated(Exception):
    """The tar ends before its end. ``member`` is the file that was cut, where it is known."""

    def __init__(self, reason: str, member: str | None = None):
        super().__init__(reason)
        self.member = member


def load_index(shard: Path, caption_fields: tuple[str, ...], class_names: list[str] | None, cache_dir: Path) -> ShardIndex:
    """The index of ``shard``, from the cache when it is still true, otherwise built and cached."""
    stat = shard.stat()
    name = stable_hash([VERSION, str(shard.resolve()), stat.st_size, stat.st_mtime_ns, caption_fields, class_names])
    rows, facts = cache_dir / f"{name}.npy", cache_dir / f"{name}.json"
    try:
        cached = json.loads(facts.read_text())
        return ShardIndex(np.load(rows, mmap_mode="r"), [Skipped(*entry) for entry in cached["skipped"]], cached["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not ours any more: built anew
    index = build_index(shard, caption_fields, class_names)
    try:
        with atomic_write(rows) as temporary, open(temporary, "wb") as file:
            np.save(file, index.samples)
        with atomic_write(facts) as temporary:
            Path(temporary).write_text(json.dumps({"skipped": index.skipped, "digest": index.digest}))
    except OSError:
        pass  # a cache that cannot be written costs time at the next start, nothing else
    return index


def build_index(shard: Path, caption_fields: tuple[str, ...], class_names: list[str] | None) -> ShardIndex:
    """Read every header and text of ``shard``. A shard that is cut off keeps the samples before the cut."""
    digest = hashlib.sha256()
    found: dict[str, dict[str, tuple[int, int]]] = {}
    skipped: list[Skipped] = []
    doubles: dict[str, None] = {}
    handle = os.open(shard, os.O_RDONLY)
    try:
        try:
            for name, start, size in _members(handle, digest):
                key, role = _key_and_role(name)
                if role is None:
                    continue
                roles = found.setdefault(key, {})
                if role in roles:
                    doubles[key] = None
                else:
                    roles[role] = (start, size)
        except Truncated as cut:
            skipped.append(Skipped(-1, shard.name, f"truncated shard: {cut}; the samples before the cut are kept"))
            if found and (key := _cut_sample(found, cut)) is not None:
                del found[key]
                skipped.append(Skipped(-1, key, f"incomplete sample: {shard.name} was cut inside it"))
        skipped += [Skipped(-1, key, f"duplicate key: again in {shard.name}, the first is used") for key in doubles]
        rows = [
            row
            for key, roles in found.items()
            if (row := _sample(handle, shard.name, key, roles, caption_fields, class_names, digest, skipped))
        ]
    finally:
        os.close(handle)
    return ShardIndex(_to_array(rows), skipped, digest.hexdigest())


def _cut_sample(found: dict[str, dict], cut: Truncated) -> str | None:
    """The sample that the cut left incomplete: the one whose file was cut, or a last one with fewer files than the
    first.
    """
    if cut.member is not None:
        key, _ = _key_and_role(cut.member)
        return key if key in found else None
    first, last = next(iter(found)), next(reversed(found))
    return last if len(found[last]) < len(found[first]) else None


def read_captions(text: bytes, record: dict, caption_fields: tuple[str, ...]) -> list[str]:
    """Every non-empty line of KEY.txt, then the caption fields of KEY.json (a string or a list of strings), each
    once.
    """
    candidates = text.decode("utf-8", errors="replace").splitlines()
    for field in caption_fields:
        value = record.get(field)
        candidates += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    stripped = (caption.strip() for caption in candidates if isinstance(caption, str))
    return list(dict.fromkeys(caption for caption in stripped if caption))


def key_hash(key: str) -> int:
    """64 bits of the key's SHA-256: decides on the split and finds duplicates, in any order and on any machine."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _members(handle: int, digest) -> Iterator[tuple[str, int, int]]:
    """(name, position, size) of every regular file. Long names are understood in both the pax and the GNU form.

    Own code instead of :mod:`tarfile`'s loop, which ends silently at a damaged header and is several times slower.

    Raises:
        Truncated: the file ends early or a header is damaged.
    """
    length = os.fstat(handle).st_size
    position, override = 0, {}
    while True:
        header = os.pread(handle, BLOCK, position)
        if not header.strip(b"\0") and len(header) == BLOCK:
            return  # the end-of-archive marker
        if len(header) < BLOCK:
            raise Truncated(f"it ends at byte {length} without an end-of-archive marker")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise Truncated(
                f"damaged header at byte {position} ({error}); {length - position} of {length} bytes cannot be read"
            ) from None
        start = position + BLOCK
        size = int(override.get("size", info.size))
        position = start + -(-size // BLOCK) * BLOCK
        if size < 0 or start + size > length:
            raise Truncated(
                f"{info.name} needs {size} bytes, {length - start} are there ({start + size - length} bytes missing)",
                override.get("path", info.name),
            )
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            override |= _pax_records(os.pread(handle, size, start))
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            override["path"] = os.pread(handle, size, start).rstrip(b"\0").decode("utf-8", "surrogateescape")
        else:
            if info.isreg():
                digest.update(header)
                yield override.get("path", info.name), start, size
            override = {}


def _pax_records(data: bytes) -> dict[str, str]:
    """The ``length key=value\\n`` records of an extended header; only path and size matter here."""
    records = {}
    while data.strip(b"\0"):
        try:
            length = int(data[: data.index(b" ")])
        except ValueError:
            raise Truncated("damaged extended header") from None
        key, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _key_and_role(name: str) -> tuple[str, str | None]:
    """Split ``folder/KEY.jpg``. Hidden files (macOS leaves ``._KEY.jpg``) and other suffixes have no role."""
    name = name.removeprefix("./")
    key, _, suffix = name.rpartition(".")
    hidden = os.path.basename(name).startswith(".")
    return key, None if hidden or not key else ROLES.get(suffix.lower())


def _sample(handle, shard, key, roles, caption_fields, class_names, digest, skipped) -> tuple | None:
    """One row of the index, or None after noting in ``skipped`` what the sample lacks."""
    image, text_at, json_at = (roles.get(role, (0, 0)) for role in ("image", "text", "json"))
    text, record_bytes = (os.pread(handle, size, start) for start, size in (text_at, json_at))
    digest.update(text)
    digest.update(record_bytes)
    reason = None
    label, captions = -1, []
    try:
        record = parse_record(record_bytes)
        captions = read_captions(text, record, caption_fields)
        label = read_label(record, class_names)
    except ValueError as error:
        reason = f"bad json: {error}"
    if reason is None and not image[1]:
        reason = f"no image: no {', '.join('KEY.' + s for s in IMAGE_SUFFIXES)} of any size"
    if reason is None and not captions:
        reason = f"no caption: neither a line in KEY.txt nor a field {' or '.join(caption_fields)} in KEY.json"
    if reason is not None:
        skipped.append(Skipped(-1, key, f"{reason} (in {shard})"))
        return None
    return (key.encode("utf-8", "surrogateescape"), key_hash(key), *image, *text_at, *json_at, len(captions), label)


def parse_record(data: bytes) -> dict:
    """KEY.json as a dict; empty when there is none. Raises ValueError when it is not a JSON object."""
    record = json.loads(data) if data else {}
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def read_label(record: dict, class_names: list[str] | None) -> int:
    """``label`` (an integer) or ``class`` (a name in classes.txt) of KEY.json; -1 without one. Raises ValueError."""
    label, name = record.get("label"), record.get("class")
    if isinstance(label, int) and not isinstance(label, bool):
        if label < 0 or (class_names is not None and label >= len(class_names)):
            raise ValueError(f"label {label} is outside classes.txt")
        return label
    if isinstance(name, str) and class_names is not None:
        if name not in class_names:
            raise ValueError(f"class {name!r} is not in classes.txt")
        return class_names.index(name)
    return -1


def _to_array(rows: list[tuple]) -> np.ndarray:
    width = max((len(row[0]) for row in rows), default=1)
    places = [(f"{role}_{what}", "<i8") for role in ("image", "text", "json") for what in ("start", "size")]
    fields = [("key", f"S{width}"), ("hash", "<u8"), *places, ("captions", "<i4"), ("label", "<i4")]
    return np.array(rows, dtype=fields)
