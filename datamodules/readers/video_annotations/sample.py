"""What an annotation file says about one sample, in one form for all data sets, and the pieces their readers share."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.readers.clips import Media
from models.errors import UserError

UNKNOWN = -1  # an answer that is not given (a hidden test set) or not in the training vocabulary


class Sample(NamedTuple):
    """One row of a data set.

    ``texts``: captions, one of which is drawn; or the one question or prompt; or all candidates where ``answer`` is an index
    among them. ``answer``: class or candidate, UNKNOWN where there is none. ``reasons``, ``reason``: candidates and answer of
    VCR's second step. ``group``: kind of question, for the report. ``boxes``: regions to be painted into the picture.
    """

    key: str
    media: Media
    texts: tuple[str, ...]
    answer: int = UNKNOWN
    reasons: tuple[str, ...] = ()
    reason: int = UNKNOWN
    group: str = ""
    boxes: tuple[tuple[int, tuple[float, float, float, float]], ...] = ()

    def draw(self, rng: np.random.Generator | None) -> tuple[str, Media]:
        """The caption or question and the part of the clip of this visit; without ``rng`` always the same, the first."""
        return self.texts[0 if rng is None else int(rng.integers(len(self.texts)))], self.media


class Annotations(NamedTuple):
    """The rows of one split; the names of the answers, in the order of their numbers; and what was found to be unusable."""

    samples: list
    answers: tuple[str, ...] = ()
    skipped: tuple | list = ()


class AnnotationError(UserError):
    """An annotation file is missing or is not what its format says."""


class MissingSplit(LookupError):
    """The data set has no such split of its own; the datamodule holds one out."""


def choose(split: str, parts: dict[str, tuple]) -> tuple:
    """The entry of ``split`` in ``parts``. Raises MissingSplit."""
    if split not in parts:
        raise MissingSplit(split)
    return parts[split]


def metadata(root: str | Path, name: str) -> Path:
    """The folder of a data set's annotation files: ``meta_data/<name>`` (code) or ``metadata/<name>`` (documentation),
    beside the data root or in it."""
    root = Path(root)
    places = [base / folder / name for base in (root, root.parent) for folder in ("meta_data", "metadata")]
    for place in places:
        if place.is_dir():
            return place
    raise AnnotationError(f"there is no folder of annotations for {name}; looked at: {', '.join(map(str, places))}")


def existing(path: Path) -> Path:
    if not path.is_file():
        raise AnnotationError(f"there is no annotation file {path}; fetch the data set's annotations, or mend datamodule.root.")
    return path


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with existing(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise AnnotationError(f"{path}, line {number} is not JSON ({error})") from None


def json_file(path: Path) -> Any:
    try:
        return json.loads(existing(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AnnotationError(f"{path} is not JSON ({error})") from None


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def plain_pickle(path: Path) -> Any:
    """A pickle of dicts, lists, strings and numbers; anything that would run code is refused."""
    try:
        with existing(path).open("rb") as file:
            return _PlainUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise AnnotationError(f"{path} is no pickle of plain values ({error}); nothing in it was executed") from None


def table(path: Path, columns: int, header: bool = False) -> Iterator[list[str]]:
    """Rows of a tab-separated file with at least ``columns`` fields; quotes are ordinary characters."""
    with existing(path).open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, row in enumerate(rows, 1):
            if header and number == 1 or not row:
                continue
            if len(row) < columns:
                raise AnnotationError(f"{path}, line {number} has {len(row)} fields, fewer than {columns}")
            yield row


def field(record: dict[str, Any], name: str, path: Path) -> Any:
    try:
        return record[name]
    except KeyError:
        raise AnnotationError(f"{path} has a record without the field '{name}': {str(record)[:120]}") from None
