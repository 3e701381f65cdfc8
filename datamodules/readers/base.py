"""What readers share: the error for one bad sample, and the interface of image-text datasets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from models.batch import Skipped

LONGEST_NAME = 255  # bytes of a file name, on every common file system


class BadSample(ValueError):
    """One sample cannot be read or used. The message is ``kind: details``; skips are counted by kind.

    :class:`~datamodules.rows.RowDataset` turns it into a :class:`~models.batch.Skipped`, so that no single sample ends a run.
    """


class ImageTextDataset(Protocol):
    """Image-text pairs in any on-disk format. Row ``i`` is one image with at least one caption.

    Attributes:
        skipped: samples that were dropped while the annotations were read.
        class_names: names of the labels, or None.
        fingerprint: changes whenever an image, a caption or a label changes.
        caption_counts: (N,) int64, captions of each row.
        labels: (N,) int64 class indices, -1 where a row has none.
        pre_encoded: True if the rows are features that another program computed, see
            :class:`~datamodules.readers.sail_chunks.SailChunks`; they have no images.
    """

    skipped: list[Skipped]
    class_names: list[str] | None
    fingerprint: str
    pre_encoded: bool

    @property
    def caption_counts(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def key(self, i: int) -> str:
        """Name of the sample on disk."""
        ...

    def captions(self, i: int) -> list[str]:
        """Captions in the order of the annotations, the raw one first."""
        ...

    def image(self, i: int) -> Image.Image:
        """RGB image. Raises BadSample."""
        ...

    def part(self, low: float, high: float) -> ImageTextDataset:
        """The share [low, high) of the samples, drawn by a hash of their keys."""
        ...


def inside(folder: str | Path, *parts: Any) -> Path:
    """``folder/parts``. Raises BadSample unless every part is a relative path that stays below ``folder``."""
    for part in parts:
        if not isinstance(part, str) or not part.strip():
            raise BadSample(f"bad path: {str(part)[:80]!r} is not a file name")
        names = part.replace("\\", "/").split("/")
        if os.path.isabs(part) or ".." in names or "\0" in part:
            raise BadSample(f"bad path: {part[:80]!r} leads out of {folder}")
        if any(len(name.encode("utf-8", "replace")) > LONGEST_NAME for name in names):
            raise BadSample(f"bad path: {part[:80]!r}... is longer than a file name can be")
    return Path(folder, *parts)
