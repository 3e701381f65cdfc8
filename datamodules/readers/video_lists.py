"""The lists of efficient video recognition: ActivityNet, FCVID, Mini-Kinetics (AdaFocusV2) and Kinetics-Sounds (AdaMML)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import UserError

Layout = Literal["activitynet", "fcvid", "mini_kinetics", "kinetics_sounds"]
MAX_LABELS = 3
FEWEST_FRAMES = 3


class Files(NamedTuple):
    """Names below the root: the lists by split (a test list is this project's addition), the class names, and how a frame is
    named below ``folder/<path>``."""

    lists: dict[str, str]
    classes: tuple[str, ...]
    folder: str
    image: str
    separator: str


LAYOUTS: dict[str, Files] = {
    "activitynet": Files(
        {split: f"actnet_{split}_split.txt" for split in ("train", "val", "test")},
        ("classInd.txt", "actnet_classInd.txt"),
        "frames",
        "image_{:05d}.jpg",
        ",",
    ),
    "fcvid": Files(
        {split: f"fcvid_{split}_split.txt" for split in ("train", "val", "test")},
        ("fcvid_classInd.txt", "classInd.txt"),
        "frames",
        "image_{:05d}.jpg",
        ",",
    ),
    "mini_kinetics": Files(
        {split: f"mini_{split}_videofolder.txt" for split in ("train", "val", "test")},
        ("minik_classInd.txt", "classInd.txt"),
        "",
        "img_{:05d}.jpg",
        " ",
    ),
    "kinetics_sounds": Files(
        {split: f"{split}.txt" for split in ("train", "val", "test")}, ("classInd.txt",), "", "{:05d}.jpg", ";"
    ),
}


class VideoRow(NamedTuple):
    """One line of a list: frames ``first`` ... ``first + count - 1`` (from 1) of ``path``, with its true labels, ascending."""

    path: str
    first: int
    count: int
    labels: tuple[int, ...]


def read_list(file: Path, layout: Layout) -> list[VideoRow]:
    """The rows of a list with at least 3 frames, in order. Raises UserError naming the line that is not understood."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line.strip("\r\n"), layout)
        except ValueError:
            wanted = {
                ",": "path,num_frames,label[,label[,label]]",
                " ": "path num_frames label",
                ";": "path;first_frame;last_frame;label",
            }[LAYOUTS[layout].separator]
            raise UserError(f"{file}, line {number}: '{line[:80]}' is not '{wanted}' (datamodule.layout={layout}).") from None
        if row.count >= FEWEST_FRAMES:
            rows.append(row)
    return rows


def _parse(line: str, layout: Layout) -> VideoRow:
    separator = LAYOUTS[layout].separator
    if separator == " ":  # a path may hold spaces itself
        path, count, *labels = line.rsplit(" ", 2)
        first = 1
    elif separator == ",":
        path, count, *labels = line.split(",")
        first = 1
    else:
        path, start, end, *labels = line.split(";")
        first, count = int(start), str(int(end) - int(start) + 1)
    kept = tuple(sorted({int(label) for label in labels if int(label) >= 0}))
    if not path or not 1 <= len(kept) <= MAX_LABELS:
        raise ValueError(line)
    return VideoRow(path, first, int(count), kept)


def read_classes(root: Path, layout: Layout) -> list[str] | None:
    """Class names, one a line; None where the dataset comes without them."""
    for name in LAYOUTS[layout].classes:
        if (root / name).is_file():
            return [line.strip() for line in (root / name).read_text(encoding="utf-8").splitlines() if line.strip()]
    return None


def padded_labels(rows: list[VideoRow]) -> NDArray[np.int64]:
    """(N, 3) labels, padded with -1."""
    table = np.full((len(rows), MAX_LABELS), -1, np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row.labels)] = row.labels
    return table
