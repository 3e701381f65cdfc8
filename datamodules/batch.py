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
FRAMES = "frames"  # (B, T, 3, H, W) uint8 RGB of a video's snippets
TIMES = "times"  # (B, T) float32 seconds of the frames
AUDIO = "audio"  # (B, T, n) float32 in [-1, 1]: the sound around each frame
AUDIO_VALID = "audio_valid"  # (B,) bool: whether the video has sound; where not, AUDIO is 0
LABELS = "labels"  # (B, L) int64: all labels of a sample, padded with -1
EXTRA_TEXT_FEATURES = "extra_text_features"  # (B, Dt) frozen features of a second positive caption of the same image


class Skipped(NamedTuple):
    """A sample that could not be read: counted, listed and bounded by the base datamodule and nobody else.

    ``reason`` is ``kind: details``; skips are counted per kind. ``index`` is -1 for what has no row.
    """

    index: int
    key: str
    reason: str
