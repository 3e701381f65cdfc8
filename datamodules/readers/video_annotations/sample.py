"""What an annotation file says about one sample, in one form for all data sets, and the pieces their readers share."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.readers.base import BadSample, inside
from datamodules.readers.clip import ClipSource
from datamodules.readers.text import csv_rows, json_lines, read_json, read_text, split_lines
from models.batch import Skipped
from models.errors import UserError

UNKNOWN = -1  # an answer that is not given (a hidden test set) or not in the training vocabulary
MOST_ANSWERS = 10**6
LARGEST_PICKLE = 2**26  # bytes


class Sample(NamedTuple):
    """One row of a data set.

    Attributes:
        key: name of the sample.
        source: where its clip lies.
        texts: captions, one of which is drawn; or the one question or prompt; or all candidates where ``answer`` is an index
            among them.
        answer: class or candidate, UNKNOWN where there is none.
        reasons: candidates of VCR's second step.
        reason: answer of VCR's second step.
        group: kind of question, for the report.
        boxes: (rank, (x1, y1, x2, y2) in pixels) of regions that are painted into the image.
    """

    key: str
    source: ClipSource
    texts: tuple[str, ...]
    answer: int = UNKNOWN
    reasons: tuple[str, ...] = ()
    reason: int = UNKNOWN
    group: str = ""
    boxes: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def draw(self, rng: np.random.Generator | None) -> tuple[str, ClipSource]:
        """The caption or question and the part of the clip of this visit; without ``rng`` always the same, the first."""
        return self.texts[0 if rng is None else int(rng.integers(len(self.texts)))], self.source


class Annotations(NamedTuple):
    """The rows of one split; the names of the answers, in the order of their numbers; and records that cannot be used."""

    samples: list[Sample]
    answers: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] | list[Skipped] = ()


class AnnotationError(UserError):
    """An annotation file is missing or is not what its format says."""


class MissingSplit(LookupError):
    """The data set has no such split of its own; the datamodule holds one out."""


def collect(
    records: Iterable[tuple[str, Any]],
    sample_of: Callable[[Any], Sample],
    answers: tuple[str, ...] = (),
    choices: bool = False,
    numbered: bool = False,
) -> Annotations:
    """The samples of all records; a record that cannot be used is skipped with its reason.

    Args:
        records: (where it stands, its content).
        sample_of: makes the sample of one record; whatever it raises for a malformed one becomes the reason.
        answers: names of the classes that ``Sample.answer`` counts.
        choices: texts are candidates, as many in every sample as in the first, and ``Sample.answer`` is an index among them.
        numbered: several records share a clip; the number of the record makes the key of each sample unique.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for number, (where, record) in enumerate(records):
        try:
            sample = _checked(sample_of(record))
            options = len(sample.texts) if choices else len(answers)
            if choices and samples and options != len(samples[0].texts):
                raise BadSample(f"bad record: {options} options instead of {len(samples[0].texts)}")
            if options and not (sample.answer == UNKNOWN or 0 <= sample.answer < options):
                raise BadSample(f"bad record: answer {sample.answer} of {options}")
            samples.append(sample._replace(key=f"{sample.key}#{number}") if numbered else sample)
        except BadSample as error:
            skipped.append(Skipped(-1, where, str(error)))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, SyntaxError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:120]
            skipped.append(Skipped(-1, where, f"bad record: {reason} in {str(record)[:120]}"))
    return Annotations(samples, answers, skipped)


def _checked(sample: Sample) -> Sample:
    texts = (*sample.texts, *sample.reasons)
    if not sample.texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadSample(f"no caption: {str(texts)[:80]}")
    return sample


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


def video(root: str | Path, *parts: str, **where: Any) -> ClipSource:
    """The video ``root/parts``, a relative path below ``root``, see :func:`~datamodules.readers.base.inside`."""
    return ClipSource(str(inside(root, *parts)), **where)


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of the non-empty lines of a text file. Raises AnnotationError."""
    for number, line in enumerate(split_lines(_text(path)), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a JSON list, or of a file of JSON lines (``.jsonl``). Raises AnnotationError."""
    if path.suffix == ".jsonl":
        _existing(path)
        yield from json_lines(path, AnnotationError)
        return
    content = json_file(path)
    if not isinstance(content, list):
        raise AnnotationError(f"{path} holds {type(content).__name__} instead of a list: another format?")
    yield from ((f"{path}, entry {number}", record) for number, record in enumerate(content))


def json_file(path: Path) -> Any:
    """Content of a JSON file. Raises AnnotationError."""
    return read_json(_existing(path), AnnotationError)


def answer_numbers(path: Path) -> dict[str, int]:
    """A JSON object of answers and their numbers. Raises AnnotationError."""
    numbers = json_file(path)
    if not isinstance(numbers, dict) or not all(
        isinstance(number, int) and 0 <= number < MOST_ANSWERS for number in numbers.values()
    ):
        raise AnnotationError(f"{path} is no object of answers and their numbers.")
    return numbers


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def named_rows(path: Path, delimiter: str, *columns: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row by column) of a file with a header that has the ``columns``. Raises AnnotationError."""
    return csv_rows(_existing(path), columns, AnnotationError, delimiter)


def plain_pickle(path: Path) -> Any:
    """A pickle of dicts, lists, strings and numbers; anything that would run code is refused."""
    try:
        if _existing(path).stat().st_size > LARGEST_PICKLE:
            raise ValueError(f"more than {LARGEST_PICKLE} bytes")
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle fails in many ways
        raise AnnotationError(f"{path} is no pickle of plain values ({error}); nothing in it was executed.") from None


def table(path: Path, columns: int, header: bool = False) -> Iterator[tuple[str, list[str]]]:
    """(where, row) of a tab-separated file; quotes are ordinary characters. A short row is padded with None.

    Raises AnnotationError.
    """
    for where, line in itertools.islice(lines(path), int(header), None):
        row = line.split("\t")
        yield where, row + [None] * (columns - len(row))


def _text(path: Path) -> str:
    return read_text(_existing(path), AnnotationError)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise AnnotationError(
            f"there is no annotation file {path}; fetch the data set's annotations, or correct datamodule.root."
        )
    return path
