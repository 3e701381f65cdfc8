"""What an annotation file says about one image with its texts, in one form for all data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from datamodules.readers.arrow import arrow_image
from datamodules.readers.base import BadSample
from datamodules.readers.images import open_rgb
from models.batch import Skipped
from models.errors import UserError

UNKNOWN = -1  # an answer that is not given (a hidden test set) or not in the vocabulary


class ImageSource(NamedTuple):
    """An image file, or with ``row`` that row of an Arrow file."""

    path: str
    row: int = -1
    column: str = "image"

    def open(self) -> Image.Image:
        """The RGB image. Raises BadSample."""
        return open_rgb(Path(self.path)) if self.row < 0 else arrow_image(self.path, self.row, self.column)


class ImageSample(NamedTuple):
    """One row of a data set: an image with captions, or with a question or sentence about it.

    Attributes:
        key: name of the sample.
        image: where the image lies.
        medium: number of the image within its split; rows of one image have the same.
        captions: texts that describe the image, one of which is drawn.
        question: a question, a hypothesis, or a sentence about two images.
        answer: class of the answer; the best one where several count; UNKNOWN where there is none.
        scores: (class, score) of every answer that counts, for soft targets.
        group: kind of question, for the report.
        second: the right image of a pair.
        number: identifier of the question, for a submission.
        findings: labels of the image; a false image for its text has others. Empty where there are none.
    """

    key: str
    image: ImageSource
    medium: int
    captions: tuple[str, ...] = ()
    question: str = ""
    answer: int = UNKNOWN
    scores: tuple[tuple[int, float], ...] = ()
    group: str = ""
    second: ImageSource | None = None
    number: int | str = -1
    findings: tuple[int, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The question where there is one, else the captions."""
        return (self.question,) if self.question else self.captions


Span = tuple[int, int, int]  # first character, the one behind the last, number of the entity


class ImageAnnotations(NamedTuple):
    """The rows of one split; the names of the answers, in the order of their numbers; records that cannot be used; and the
    entities of the texts, where the files hold them."""

    samples: list[ImageSample]
    answers: tuple[str, ...] = ()
    skipped: Sequence[Skipped] = ()
    links: Mapping[str, Sequence[Span]] | None = None


class MissingSplit(LookupError):
    """The data set has no such split of its own; the datamodule holds one out."""


def collect(
    records: Iterable[tuple[str, Any]],
    samples_of: Callable[[Any], Iterable[ImageSample]],
    answers: tuple[str, ...] = (),
    first_medium: int = 0,
) -> ImageAnnotations:
    """The samples of all records; a record that cannot be used is skipped with its reason.

    Args:
        records: (where it stands, its content).
        samples_of: makes the samples of one record; whatever it raises for a malformed one becomes the reason.
        answers: names of the classes that ``ImageSample.answer`` counts.
        first_medium: added to the numbers of images.
    """
    samples: list[ImageSample] = []
    skipped: list[Skipped] = []
    for where, record in records:
        try:
            made = [_checked(sample) for sample in samples_of(record)]
            samples += [sample._replace(medium=sample.medium + first_medium) for sample in made]
        except BadSample as error:
            skipped.append(Skipped(-1, where, str(error)))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:120]
            skipped.append(Skipped(-1, where, f"bad record: {reason} in {str(record)[:120]}"))
    return ImageAnnotations(samples, answers, skipped)


def concatenate(parts: Sequence[ImageAnnotations]) -> ImageAnnotations:
    """All rows; the numbers of images of each part follow those before. The data sets must agree on the answers."""
    answers = {part.answers for part in parts if part.answers}
    if len(answers) > 1:
        raise UserError("datamodule.annotations: these data sets have different answers and cannot be joined.")
    samples: list[ImageSample] = []
    for part in parts:
        first = 1 + max((sample.medium for sample in samples), default=-1)
        samples += [sample._replace(medium=sample.medium + first) for sample in part.samples] if first else part.samples
    links = [part.links for part in parts if part.links is not None]
    if links and len(links) < len(parts):
        raise UserError("datamodule.annotations: some of these data sets hold linked entities and others do not; join none.")
    joined = {text: spans for of_part in links for text, spans in of_part.items()} if links else None
    skipped = [entry for part in parts for entry in part.skipped]
    return ImageAnnotations(samples, next(iter(answers), ()), skipped, joined)


def unique(texts: Iterable[Any]) -> tuple[str, ...]:
    """The texts without repetitions, in their order; the official code takes them in the order of a set."""
    cleaned = (text.strip() for text in texts if isinstance(text, str))
    return tuple(dict.fromkeys(text for text in cleaned if text))


def existing(root: str | Path, *places: str) -> Path:
    """The first of ``places`` that is a file below ``root``. Raises UserError that names them all."""
    for place in places:
        if (path := Path(root, place)).is_file():
            return path
    raise UserError(
        f"there is no {' nor '.join(places)} in {root}. Fetch the data set's annotations, or correct datamodule.root."
    )


def parts_of(split: str, parts: dict[str, Sequence[str]]) -> Sequence[str]:
    """The subsets that ``split`` is made of. Raises MissingSplit."""
    if not parts.get(split):
        raise MissingSplit(split)
    return parts[split]


def _checked(sample: ImageSample) -> ImageSample:
    if not sample.texts or not all(isinstance(text, str) and text.strip() for text in sample.texts):
        raise BadSample(f"no text: {str(sample.texts)[:80]}")
    return sample
