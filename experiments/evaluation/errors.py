"""Tables of a split's worst errors with their images: files of the run directory, and tables of its W&B run."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from datamodules.readers.base import BadSample
from models.io import atomic_write

WORST = 24  # errors of a table
SIDE = 512  # pixels of the longest side of a stored image
# Column -> text, number, or a function that opens an image.
ErrorRow = Mapping[str, Any]


def worst(severity: Tensor) -> list[int]:
    """Positions of the largest values (N,) above 0, largest first, at most ``WORST``."""
    order = severity.argsort(descending=True, stable=True)[:WORST]
    return order[severity[order] > 0].tolist()


def wrong_retrievals(
    ranks: Tensor, owner: Tensor, nearest: Callable[[int], int], caption: Callable[[int], str], image: Callable[[int], Any]
) -> list[ErrorRow]:
    """The texts whose own medium ranks last.

    Args:
        ranks: (M,) of each text's own medium, from 0.
        owner: (M,) the medium of each text.
        nearest: text to the medium that fits it best.
        caption: text to words.
        image: medium to a PIL image.
    """
    return [
        {
            "text": caption(text),
            "rank": int(ranks[text]) + 1,
            "own": partial(image, int(owner[text])),
            "retrieved": partial(image, nearest(text)),
        }
        for text in worst(ranks)
    ]


def strip(frames: np.ndarray) -> Image.Image:
    """Frames (T, h, w, 3) in [0, 1] side by side, as a dataset's ``display`` gives them."""
    return Image.fromarray((np.concatenate(list(frames), axis=1) * 255).round().astype(np.uint8))


def write_table(folder: Path, name: str, rows: Sequence[ErrorRow]) -> Path:
    """``<folder>/<name>.csv``; images lie in ``<folder>/<name>/`` and their columns hold file names."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.csv"
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({column: _stored(folder, name, f"{number:02d}_{column}", value) for column, value in row.items()})
    return path


def _stored(folder: Path, table: str, stem: str, value: Any) -> Any:
    if not callable(value):
        return value
    try:
        image = value().convert("RGB")
    except BadSample:  # a file that has changed since it was judged
        return ""
    image.thumbnail((SIDE, SIDE))
    file = Path(table, f"{stem}.jpg")
    (folder / table).mkdir(exist_ok=True)
    image.save(folder / file, quality=90)
    return file.as_posix()


def read_table(path: Path) -> tuple[list[str], list[list[str | float | Path]]]:
    """Columns and rows of a table that :func:`write_table` wrote; an image is the path of its file."""
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file)
    return columns, [[_cell(path.parent, value) for value in row] for row in rows]


def _cell(folder: Path, text: str) -> str | float | Path:
    if text.endswith(".jpg") and (folder / text).is_file():
        return folder / text
    try:
        return float(text)
    except ValueError:
        return text


def confidence_of_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) probability of the predicted class where it is wrong, else 0.

    Args:
        logits: (N, C).
        labels: (N,), or (N, L) where several classes are right; negative numbers are no class, and without any class no
            prediction is wrong.
    """
    confidence, predicted = torch.softmax(logits.float(), dim=1).max(dim=1)
    labels = labels.reshape(len(labels), -1)
    wrong = (labels != predicted[:, None]).all(dim=1) & (labels >= 0).any(dim=1)
    return torch.where(wrong, confidence, 0.0)


def missed(overlap: Tensor, present: Tensor) -> Tensor:
    """(N,) 1 - overlap where there is a box and the prediction overlaps it by at most a half, else 0.

    Args:
        overlap: (N,) IoU of each predicted box with the true one.
        present: (N,) bool, whether there is a true one.
    """
    return torch.where(present & (overlap <= 0.5), 1 - overlap, 0.0)


def outlined(image: Image.Image, boxes: Mapping[str, Sequence[float]]) -> Image.Image:
    """A copy with the outlines of boxes: colour -> left, top, right and bottom as shares of the image's sides."""
    drawn = image.convert("RGB")
    pen, width = ImageDraw.Draw(drawn), max(round(max(image.size) / 128), 1)
    for colour, box in boxes.items():
        left, top, right, bottom = (share * side for share, side in zip(box, image.size * 2, strict=True))
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=width)
    return drawn
