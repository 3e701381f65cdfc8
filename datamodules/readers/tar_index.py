"""The index of one tar shard: where every sample's files lie, so that they can be read in any order without unpacking.

A shard holds the files of a sample under one name: ``KEY.jpg`` (or jpeg, png, webp), ``KEY.txt``, ``KEY.json``, ``KEY.cls``,
the layout that img2dataset and webdataset write. Building an index reads every header and every text once; it is kept in
a cache folder and rebuilt when the shard's size or time of change differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.readers.text import clean_text, decode_text, parse_json, split_lines
from models.batch import Skipped
from models.io import WriteError, atomic_write, stable_hash

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
ROLES = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), "txt": "text", "json": "json", "cls": "class"}
BLOCK = 512  # bytes; tar headers and padding come in such blocks
LARGEST_HEADER = 2**20  # bytes of an extended header
LARGEST_TEXT = 2**24  # bytes of KEY.txt or KEY.json
LARGEST_IMAGE = 2**30  # bytes
LARGEST_LABEL = 2**31
VERSION = 2  # of the cached index; raise it when the fields below or their meaning change


class ShardIndex(NamedTuple):
    """What is known of one shard.

    ``samples``: structured array, one entry per usable sample: key, hash (64 bits of the key's digest), and position
    and size in bytes of image, text and json (size 0: absent), number of captions, label (-1: none).
    ``skipped``: what was dropped while indexing. ``digest``: of every header and text and of a probe of every image, thus of
    what the shard holds.
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
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        pass  # not there, or not ours any more: built anew
    index = build_index(shard, caption_fields, class_names)
    try:
        with atomic_write(rows) as temporary, open(temporary, "wb") as file:
            np.save(file, index.samples)
        with atomic_write(facts) as temporary:
            Path(temporary).write_text(json.dumps({"skipped": index.skipped, "digest": index.digest}))
    except (OSError, WriteError):
        pass  # a cache that cannot be written costs time at the next start, nothing else
    return index


def build_index(shard: Path, caption_fields: tuple[str, ...], class_names: list[str] | None) -> ShardIndex:
    """Read every header and text of ``shard``. A shard that is cut off keeps the samples before the cut."""
    digest = hashlib.sha256()
    handle = os.open(shard, os.O_RDONLY)
    try:
        members, skipped = index_members(handle, shard.name, ROLES, digest)
        rows = [
            row
            for key, roles in members.items()
            if (row := _sample(handle, shard.name, key, roles, caption_fields, class_names, digest, skipped))
        ]
    finally:
        os.close(handle)
    return ShardIndex(_to_array(rows), skipped, digest.hexdigest())


def index_members(
    handle: int, shard: str, roles: dict[str, str], digest: Any = None
) -> tuple[dict[str, dict[str, tuple[int, int]]], list[Skipped]]:
    """Where the files of each sample lie: key -> role -> (position, size), and what was dropped.

    Args:
        handle: of the open tar.
        shard: its name, for messages.
        roles: role of each suffix, in lower case; other files are ignored.
        digest: updated with every header.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    skipped: list[Skipped] = []
    doubles: dict[str, None] = {}
    try:
        for name, start, size in _members(handle, digest):
            key, role = _key_and_role(name, roles)
            if role is None:
                continue
            files = members.setdefault(key, {})
            if role in files:
                doubles[key] = None
            else:
                files[role] = (start, size)
    except Truncated as cut:
        skipped.append(Skipped(-1, shard, f"truncated shard: {cut}; the samples before the cut are kept"))
        if members and (key := _cut_sample(members, cut, roles)) is not None:
            del members[key]
            skipped.append(Skipped(-1, key, f"incomplete sample: {shard} was cut inside it"))
    skipped += [Skipped(-1, key, f"duplicate key: again in {shard}, the first is used") for key in doubles]
    return members, skipped


def _cut_sample(members: dict[str, dict], cut: Truncated, roles: dict[str, str]) -> str | None:
    """The sample that the cut left incomplete: the one whose file was cut, or a last one with fewer files than the first."""
    if cut.member is not None:
        key, _ = _key_and_role(cut.member, roles)
        return key if key in members else None
    first, last = next(iter(members)), next(reversed(members))
    return last if len(members[last]) < len(members[first]) else None


def read_captions(text: bytes, record: dict, caption_fields: tuple[str, ...]) -> list[str]:
    """Every non-empty line of KEY.txt, then the caption fields of KEY.json (a string or a list of strings), each once."""
    candidates = split_lines(decode_text(text))
    for field in caption_fields:
        value = record.get(field)
        candidates += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    stripped = (clean_text(caption).strip() for caption in candidates if isinstance(caption, str))
    return list(dict.fromkeys(caption for caption in stripped if caption))


def key_hash(key: str) -> int:
    """64 bits of the key's SHA-256: decides on the split and finds duplicates, in any order and on any machine."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _members(handle: int, digest: Any) -> Iterator[tuple[str, int, int]]:
    """(name, position, size) of every regular file. Long names are understood in both the pax and the GNU form.

    Own code instead of :mod:`tarfile`'s loop, which ends silently at a damaged header and is several times slower.

    Raises:
        Truncated: the file ends early or a header is damaged.
    """
    length = os.fstat(handle).st_size
    position = 0
    override: dict[str, Any] = {}
    while True:
        header = os.pread(handle, BLOCK, position)
        if not header.strip(b"\0") and len(header) == BLOCK:
            return  # the end-of-archive marker
        if len(header) < BLOCK:
            raise Truncated(f"it ends at byte {length} without an end-of-archive marker")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise Truncated(
                f"damaged header at byte {position} ({error}); {length - position} of {length} bytes cannot be read"
            ) from None
        start = position + BLOCK
        size = override.get("size", info.size)
        position = start + -(-size // BLOCK) * BLOCK
        if size < 0 or start + size > length:
            raise Truncated(
                f"{info.name} needs {size} bytes, {length - start} are there ({start + size - length} bytes missing)",
                override.get("path", info.name),
            )
        extended = info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        if extended and size > LARGEST_HEADER:
            raise Truncated(f"damaged extended header of {size} bytes at byte {start}")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            override["path"] = os.pread(handle, size, start).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif extended:
            override |= _pax_records(os.pread(handle, size, start))
        else:
            if info.isreg():
                if digest is not None:
                    digest.update(header)
                yield override.get("path", info.name), start, size
            override = {}


def _pax_records(data: bytes) -> dict[str, Any]:
    """The ``length key=value\\n`` records of an extended header; only path and size matter here. Raises Truncated."""
    records: dict[str, Any] = {}
    while data.strip(b"\0"):
        number, blank, rest = data.partition(b" ")
        length = int(number) if number.isdigit() and len(number) < 10 else 0
        if not blank or length < len(number) + 3 or length > len(data):
            raise Truncated("damaged extended header")
        key, _, value = data[len(number) + 1 : length - 1].partition(b"=")
        if key == b"path":
            records["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise Truncated(f"damaged extended header: a size of {value[:20]!r}")
            records["size"] = int(value)
        data = data[length:]
    return records


def _key_and_role(name: str, roles: dict[str, str]) -> tuple[str, str | None]:
    """Split ``folder/KEY.jpg``. Hidden files (macOS leaves ``._KEY.jpg``) and other suffixes have no role."""
    name = name.removeprefix("./")
    key, _, suffix = name.rpartition(".")
    hidden = os.path.basename(name).startswith(".")
    return key, None if hidden or not key else roles.get(suffix.lower())


def _sample(
    handle: int,
    shard: str,
    key: str,
    roles: dict[str, tuple[int, int]],
    caption_fields: tuple[str, ...],
    class_names: list[str] | None,
    digest: Any,
    skipped: list[Skipped],
) -> tuple | None:
    """One row of the index, or None after noting in ``skipped`` what the sample lacks."""
    image, text_at, json_at, class_at = (roles.get(role, (0, 0)) for role in ("image", "text", "json", "class"))
    if max(text_at[1], json_at[1], class_at[1]) > LARGEST_TEXT or image[1] > LARGEST_IMAGE:
        skipped.append(Skipped(-1, key, f"too large: a file of it has {max(map(max, roles.values()))} bytes (in {shard})"))
        return None
    text, record_bytes, class_bytes = (os.pread(handle, size, start) for start, size in (text_at, json_at, class_at))
    for part in (text, record_bytes, class_bytes, probe(handle, *image)):
        digest.update(part)
    reason = None
    label, captions = -1, []
    try:
        record = parse_record(record_bytes)
        captions = read_captions(text, record, caption_fields)
        if class_bytes and "label" not in record:
            record["label"] = decode_text(class_bytes).strip()
        label = read_label(record, class_names)
    except ValueError as error:
        reason = str(error) if str(error).startswith("bad label") else f"bad json: {error}"
    if reason is None and not image[1]:
        reason = f"no image: no {', '.join('KEY.' + s for s in IMAGE_SUFFIXES)} of any size"
    if reason is None and not captions:
        reason = f"no caption: neither a line in KEY.txt nor a field {' or '.join(caption_fields)} in KEY.json"
    if reason is not None:
        skipped.append(Skipped(-1, key, f"{reason} (in {shard})"))
        return None
    return (key.encode("utf-8", "surrogateescape"), key_hash(key), *image, *text_at, *json_at, len(captions), label)


def probe(handle: int, start: int, size: int) -> bytes:
    """A few pieces of a file: enough to notice another image of the same size, without reading all of it."""
    if size <= 2048:
        return os.pread(handle, size, start)
    return b"".join(os.pread(handle, 128, start + (size - 128) * piece // 7) for piece in range(8))


def parse_record(data: bytes) -> dict:
    """KEY.json as a dict; empty when there is none. Raises ValueError when it is not a JSON object."""
    record = parse_json(data) if data else {}
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def read_label(record: dict, class_names: list[str] | None) -> int:
    """``label`` or ``class`` of KEY.json: a number, or a name in classes.txt; -1 without one. Raises ValueError."""
    value = record.get("label")
    value = record.get("class") if value is None else value
    if value is None or value == "" or (isinstance(value, str) and class_names is None and not value.strip().isdecimal()):
        return -1  # names without a list of them are no classes
    return label_number(value, class_names)


def label_number(value: Any, class_names: Sequence[str] | None) -> int:
    """A class as its number: an integer as a number or as text, or one of ``class_names``. Raises ValueError."""
    if isinstance(value, str) and class_names and value.strip() in class_names:
        return list(class_names).index(value.strip())
    if isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) < 19:
        value = int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST_LABEL:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST_LABEL:
        raise ValueError(f"bad label: {str(value)[:80]!r} is no class")
    if class_names and value >= len(class_names):
        raise ValueError(f"bad label: {value} is outside classes.txt, which names {len(class_names)} classes")
    return value


def _to_array(rows: list[tuple]) -> np.ndarray:
    width = max((len(row[0]) for row in rows), default=1)
    places = [(f"{role}_{edge}", "<i8") for role in ("image", "text", "json") for edge in ("start", "size")]
    fields = [("key", f"S{width}"), ("hash", "<u8"), *places, ("captions", "<i4"), ("label", "<i4")]
    return np.array(rows, dtype=fields)
