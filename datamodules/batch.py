"""The one vocabulary of batch keys, and what a dataset returns for a sample it cannot give.

Every batch is a dict. It always holds ``INDEX``: the global row of each sample in its split, so that errors, pictures
and feature stores can name a sample.
"""

from __future__ import annotations

from typing import NamedTuple

INDEX = "index"  # (B,) int64
KEY = "key"  # list of B str: the sample's name on disk
IMAGE = "image"  # (B, 3, H, W) float32 after the encoder's preprocessing
CAPTIONS = "captions"  # list of B lists of str, the first one the raw caption
LABEL = "label"  # (B,) int64 class index
IMAGE_FEATURES = "image_features"  # (B, Dv) frozen features
TEXT_FEATURES = "text_features"  # (B, Dt) frozen features of the first caption
SKIPPED = "skipped"  # list of Skipped: rows of this batch that could not be read and are not in it
EXTRA_TEXT_FEATURES = "extra_text_features"  # (B, Dt) frozen features of a second positive caption of the same image
VIEW_GRID = "view_grid"  # (B, Z, rows, cols, 2) where bird's-eye cells appear in IMAGE, normalised
VIEW_VALID = "view_valid"  # (B, Z, rows, cols) bool: whether they do
TRACES = "traces"  # (B, P, N) float32 ultrasonic envelopes in [0, 1]
CELSIUS = "celsius"  # (B,) float32 air temperature
CALIBRATIONS = "calibrations"  # datamodules.bev.Calibrations of the B samples
BEV_LABEL = "bev_label"  # (B, rows, cols) int64 class of each bird's-eye cell, 255 unknown
CONDITION = "condition"  # list of B str: day, dusk, night or glare


class Skipped(NamedTuple):
    """A sample that could not be read: counted, listed and bounded by the base datamodule and nobody else.

    ``reason`` is ``kind: details``; skips are counted per kind. ``index`` is -1 for what has no row.
    """

    index: int
    key: str
    reason: str
