"""The lists of efficient video recognition: ActivityNet, FCVID, Mini-Kinetics (AdaFocusV2) and Kinetics-Sounds (AdaMML)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.readers.base import BadSample, inside
from datamodules.readers.clip import VIDEO_SUFFIXES, ClipSource
from datamodules.readers.text import read_lines, read_names
from models.errors import UserError

Layout = Literal["activitynet", "fcvid", "mini_kinetics", "kinetics_sounds"]
MAX_LABELS = 3
FEWEST_FRAMES = 3
LARGEST = 2**31  # of a frame number or label


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
    count: int  # type: ignore[assignment]  # hides tuple.count
    labels: tuple[int, ...]


def read_list(file: Path, layout: Layout) -> list[VideoRow]:
    """The rows of a list with at least 3 frames, in order. Raises UserError naming the line that is not understood."""
    rows = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line, layout)
            inside("", row.path)
        except BadSample as error:
            raise UserError(f"{file}, line {number}: {error}. Paths are relative to datamodule.root.") from None
        except (ValueError, OverflowError):
            expected = {
                ",": "path,num_frames,label[,label[,label]]",
                " ": "path num_frames label",
                ";": "path;first_frame;last_frame;label",
            }[LAYOUTS[layout].separator]
            raise UserError(f"{file}, line {number}: '{line[:80]}' is not '{expected}' (datamodule.layout={layout}).") from None
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
    true_labels = tuple(sorted({int(label) for label in labels if int(label) >= 0}))
    in_range = all(0 <= number < LARGEST for number in (first, int(count), *true_labels))
    if not path or not 1 <= len(true_labels) <= MAX_LABELS or not in_range:
        raise ValueError(line)
    return VideoRow(path, first, int(count), true_labels)


def read_classes(root: Path, layout: Layout) -> list[str] | None:
    """Class names, one a line; None where the dataset comes without them."""
    for name in LAYOUTS[layout].classes:
        if (root / name).is_file():
            return read_names(root / name)
    return None


def locate(root: Path, files: Files, row: VideoRow, frame_rate: float) -> ClipSource:
    """Where the frames and the sound of a row lie, looked for in this order:

    a folder of frames (``files.folder``/path, numbers from 1), then a video file (path or videos/path, with or without its
    suffix). Sound is a wav (path.wav or audio/path.wav, or the path itself), else the video's own track.

    Args:
        root: folder of the data set.
        frame_rate: frames per second at which frames were extracted; a video file knows its own.

    Raises:
        BadSample: there is neither.
    """
    stem = root / row.path
    sounds = (stem, stem.with_name(f"{stem.name}.wav"), root / "audio" / f"{row.path}.wav")
    sound = next((str(path) for path in sounds if path.suffix.lower() == ".wav" and path.is_file()), "")
    frames = (row.first - 1, row.count)
    folder = root / files.folder / row.path
    if folder.is_dir():
        return ClipSource(str(folder), "frames", range=frames, fps=frame_rate, pattern=files.image, sound=sound)
    for base in (stem, root / "videos" / row.path):
        for path in (base, *(base.with_name(base.name + end) for end in VIDEO_SUFFIXES)):
            if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
                # A row that starts at frame 1 is the whole file, whose frame rate need not be the list's.
                return ClipSource(str(path), range=frames if row.first > 1 else None, sound=sound)
    raise BadSample(f"missing video: neither {folder}/ nor a video file of that name")


def padded_labels(rows: list[VideoRow]) -> NDArray[np.int64]:
    """(N, 3) labels, padded with -1."""
    table = np.full((len(rows), MAX_LABELS), -1, np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row.labels)] = row.labels
    return table
