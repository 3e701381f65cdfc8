"""Masks as run-length codes: pairs of a gap behind the run before and a length, down the columns of the image."""

from __future__ import annotations

import numpy as np

from datamodules.readers.base import BadSample


def parse_runs(code: str) -> np.ndarray:
    """(R, 2) int64 first pixel, counted down the columns from 0, and length of each run; "-1" and nothing are no run.

    Raises BadSample for anything but pairs of numbers that are not negative.
    """
    words = code.split()
    if words in ([], ["-1"]):
        return np.zeros((0, 2), np.int64)
    if len(words) % 2 or not all(word.isdecimal() and len(word) < 10 for word in words):
        raise BadSample(f"bad row: run-length code {code[:40]!r}")
    gaps, lengths = np.array(words, np.int64).reshape(-1, 2).T
    return np.stack([np.cumsum(gaps) + np.cumsum(lengths) - lengths, lengths], axis=1)


def mask_of_runs(runs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool of an image of ``size`` (width, height). Raises BadSample where a run leaves the image."""
    width, height = size
    if len(runs) and runs.sum(axis=1).max() > width * height:
        raise BadSample(f"masks: a run-length code leaves its image of {width} x {height} pixels")
    flat = np.zeros(width * height, bool)
    for start, length in runs:
        flat[start : start + length] = True
    return flat.reshape(width, height).T
