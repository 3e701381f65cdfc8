"""Which frames of a clip are read: n equal parts, and one frame of each."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.readers.base import BadSample

Official = Literal["all_in_one", "adafocus"]


class Segments(NamedTuple):
    """Inclusive first and last frames (n,) int64 of n equal parts of a video."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]


def sample_frames(
    count: int, length: int, rng: np.random.Generator | None = None, official: Official | None = None
) -> NDArray[np.int64]:
    """(count,) frame numbers from 0, in the order of time.

    Args:
        count: frames that are wanted.
        length: frames that there are.
        rng: draws a random frame of each part, for training; None takes the middle ones.
        official: the rule of a paper's code. ``all_in_one`` never draws the last frame of a part. ``adafocus`` (AdaFocusV2,
            ``ops/dataset.py``) has parts of ``length // count`` frames in training, the middle of real-valued parts in
            evaluation, and repeats the last frame of short videos.

    Raises:
        BadSample: "too short": fewer frames than are wanted (not with ``adafocus``), or nothing to draw from.
    """
    if official == "adafocus":
        return _adafocus_frames(count, length, rng)
    if length < count:
        raise BadSample(f"too short: {length} frames, fewer than the {count} that are wanted")
    if rng is None:
        return middle_frames(count, length)
    first, last = random_bounds(count, length, official == "all_in_one")
    return first + (rng.random(count) * (last - first + 1)).astype(np.int64)


def segments(count: int, length: int) -> Segments:
    """Cut ``length`` frames into ``n = min(count, length)`` parts at floor(k * length / n)."""
    n = min(count, length)
    bounds = np.arange(n + 1) * length // n
    return Segments(bounds[:-1], bounds[1:] - 1)


def middle_frames(count: int, length: int) -> NDArray[np.int64]:
    """The middle frame of each part."""
    first, last = segments(count, length)
    return (first + last) // 2


def random_bounds(count: int, length: int, official: bool = False) -> Segments:
    """Inclusive bounds of the random draw in each part.

    Args:
        official: never the last frame of a part; a part of one frame raises BadSample, and the official reader of All-in-One
            then takes another sample.
    """
    first, last = segments(count, length)
    if official:
        last = last - 1
        if bool((last < first).any()):
            raise BadSample(f"too short: {length} frames leave nothing to draw from in {count} segments")
    return Segments(first, last)


def _adafocus_frames(count: int, length: int, rng: np.random.Generator | None) -> NDArray[np.int64]:
    steps = np.arange(count)
    if rng is not None and length >= count:
        part = length // count
        return steps * part + rng.integers(0, part, count)
    if rng is None and length > count:
        return np.floor(length / count / 2 + length / count * steps).astype(np.int64)
    return np.minimum(steps, length - 1)
