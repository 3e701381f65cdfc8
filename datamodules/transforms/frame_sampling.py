"""Which frames of a video are looked at (AdaFocusV2, ``ops/dataset.py``). Frame numbers count from 1, as image files do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def training_frames(num_frames: int, snippets: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(T,) one random frame of each of T equal stretches."""
    stretch = num_frames // snippets
    if stretch:
        return np.arange(snippets) * stretch + rng.integers(0, stretch, snippets) + 1
    return _all_then_the_last(num_frames, snippets)


def evaluation_frames(num_frames: int, snippets: int) -> NDArray[np.int64]:
    """(T,) the middle frame of each of T equal stretches."""
    if num_frames > snippets:
        tick = num_frames / snippets
        return np.floor(tick / 2 + tick * np.arange(snippets)).astype(np.int64) + 1
    return _all_then_the_last(num_frames, snippets)


def _all_then_the_last(num_frames: int, snippets: int) -> NDArray[np.int64]:
    return np.minimum(np.arange(snippets), num_frames - 1) + 1
