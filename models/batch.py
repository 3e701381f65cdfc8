"""The vocabulary of batch keys that several families share, and what a dataset returns for a sample it cannot give.

Every batch is a dict. It always holds ``INDEX``: the global row of each sample in its split, so that errors, figures and
feature stores can name a sample. Keys of one family stand in ``models/<family>/batch.py``.
"""

from __future__ import annotations

from typing import NamedTuple

INDEX = "index"  # (B,) int64
KEY = "key"  # list of B str: the sample's name on disk
IMAGE = "image"  # (B, 3, H, W) float32 after the encoder's preprocessing
TOKENS = "tokens"  # dict of (B, L) int64: what a text encoder takes
CAPTIONS = "captions"  # list of B lists of str, the first one the raw caption
LABEL = "label"  # (B,) int64 class index
SKIPPED = "skipped"  # list of Skipped: rows of this batch that could not be read and are not in it
TIMES = "times"  # (B, T) float32 seconds of the frames
AUDIO = "audio"  # (B, T, n) float32 in [-1, 1]: the sound around each frame
AUDIO_VALID = "audio_valid"  # (B,) bool: whether the video has sound; where not, AUDIO is 0
SILENT = "silent"  # bool, not a tensor: no video of the batch has sound
LABELS = "labels"  # (B, L) int64: all labels of a sample, padded with -1
TOKEN_IDS = "token_ids"  # (B, L) int64, 0 at padding
TOKEN_MASK = "token_mask"  # (B, L) int64, 1 at tokens
VIDEO = "video"  # (B, T, 3, H, W) RGB frames: uint8, or float32 after a transform
MATCHED = "matched"  # (B,) int64: 1 where text and clip belong together
MASKED_IDS, MASKED_LABELS = "masked_ids", "masked_labels"  # (B, L) int64; labels are IGNORE_INDEX where nothing is masked
CANDIDATE_IDS, CANDIDATE_MASK = "candidate_ids", "candidate_mask"  # (B, C, L): texts to choose from
ANSWER = "answer"  # (B,) int64 class or candidate; IGNORE_INDEX where unknown

IGNORE_INDEX = -100  # the class of a token or an answer without a label
VOID_LABEL = 255  # the class of a pixel or a bird's-eye cell whose truth is unknown


class Skipped(NamedTuple):
    """A sample that could not be read: counted, listed and bounded by the base datamodule.

    ``reason`` is ``kind: details``; skips are counted per kind. ``index`` is -1 for what has no row.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    key: str
    reason: str
