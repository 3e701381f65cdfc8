"""A user's own radiographs: a table ``images.csv`` beside the files, or tar shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from datamodules.readers.base import BadSample
from datamodules.readers.radiographs import (
    METADATA,
    SPLITS,
    SUFFIXES,
    UNKNOWN,
    Entry,
    RadiographTable,
    one_file,
    person,
    read_rows,
    split_of_folder,
    table_of,
)
from datamodules.readers.tar_index import index_members, parse_record
from models.batch import Skipped
from models.errors import UserError

NOT_FINDINGS = {"path", "patient", "split", "report", *METADATA}  # columns; every other one is a finding
ROLES = {**{suffix[1:]: f"image{suffix}" for suffix in SUFFIXES}, "json": "json"}


def own_table(root: Path) -> RadiographTable:
    """``images.csv`` with the column ``path``, below the root, and any of ``patient``, ``split`` (train, val or test),
    ``sex`` (M or F), ``age`` (years), ``view`` (PA or AP) and ``report``.

    Every other column is a finding: 1 present, 0 absent, -1 or nothing for unknown.
    """
    rows = list(read_rows(one_file(root, "images.csv")))
    if not rows or "path" not in rows[0]:
        raise UserError(f"{root / 'images.csv'} needs a line of column names, 'path' among them, and at least one image.")
    names = [name for name in rows[0] if name and name not in NOT_FINDINGS]
    return table_of(rows, lambda row: _entry(row["path"], row, names), names, "path")


def tar_shards(root: Path) -> RadiographTable:
    """``*.tar`` below the root: KEY.png, another kind of image or KEY.dcm, and KEY.json where something is known of the image.

    The keys of KEY.json are the columns of :func:`own_table`. A folder train, val or test at the top is that split.
    Images are read at their place in the tar: nothing is unpacked.
    """
    shards = sorted(root.rglob("*.tar"))
    if not shards:
        raise UserError(f"datamodule.root: {root} holds no .tar file (compressed ones cannot be read at random places).")
    members: dict[str, tuple[str, int, int]] = {}
    rows: list[dict[str, str]] = []
    skipped: list[Skipped] = []
    for shard in shards:
        name = shard.relative_to(root).as_posix()
        handle = os.open(shard, os.O_RDONLY)
        try:
            samples, lost = index_members(handle, name, ROLES)
            skipped += lost
            for key, files in samples.items():
                role = next((role for role in files if role != "json"), None)
                if role is None:
                    continue
                path = f"{name}/{key}{role.removeprefix('image')}"
                try:
                    start, size = files.get("json", (0, 0))
                    record = parse_record(os.pread(handle, size, start))
                except ValueError as error:
                    skipped.append(Skipped(-1, path, f"bad json: {error}"))
                    continue
                members[path] = (name, *files[role])
                rows.append({**{name: "" if x is None else str(x) for name, x in record.items()}, "path": path})
        finally:
            os.close(handle)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in NOT_FINDINGS))
    table = table_of(rows, lambda row: _entry(row["path"], row, names), names, "path")
    return table._replace(members=members, skipped=[*skipped, *table.skipped])


def _entry(path: str, row: Mapping[str, str], names: Sequence[str]) -> Entry:
    split = (row.get("split") or "").strip() or split_of_folder(path)
    if split and split not in SPLITS:
        raise BadSample(f"bad row: the split {split[:40]!r} is none of {', '.join(SPLITS)}")
    known = person(row.get("sex"), row.get("age"), row.get("view"))
    findings = [_finding(row.get(name) or "") for name in names]
    return Entry(path, (row.get("patient") or "").strip() or path, findings, split, known, (row.get("report") or "").strip())


def _finding(value: str) -> int:
    number = float(value) if value.strip() else float(UNKNOWN)
    if number not in (1.0, 0.0, UNKNOWN):
        raise BadSample(f"bad row: a finding is {value[:40]!r}, not 1, 0 or -1")
    return int(number)
